"""Quantized results straight to S3 and to the Hub: those of a folder, checked before they go."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran, digests
from tests.hub_server import HubServer
from tests.places import (
    DIE_IN_S3,
    SECRET,
    Bucket,
    counted,
    hub_environment,
    journal_below,
    killed,
    on_hub,
    watch,
)

for needed in ("s3fs", "boto3", "moto.server"):
    pytest.importorskip(needed)
torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("s3")

REPO = "org/mine"
TEXT = Path(__file__)
CALIBRATED = ("--calibration", TEXT, "--context", "32", "--windows", "16")
SPLIT = ("--to", "gguf", "q8_0", "--no-verify", "--split-max-size", "20kB", "--threads", "1")
BEGUN = ("create_multipart_upload", "upload_part", "put_object")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of bytes and some merges of this file's."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT.read_text()], tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def quantize(pack: Callable[..., Ran], model: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Quantize in this process; no secret is shown, or kept beside the result."""

    def run(place: object, *words: object) -> Ran:
        ran = pack("quantize", model, "-o", place, *words, cwd=tmp_path)
        assert SECRET not in ran.out + ran.err
        for path in (tmp_path / "dist").rglob("*"):
            assert path.is_dir() or SECRET.encode() not in path.read_bytes()
        assert not (tmp_path / "s3:").exists()
        return ran

    return run


def _local(quantize: Callable[..., Ran], tmp_path: Path, *words: object) -> dict[str, str]:
    """What a folder gets."""
    ran = quantize("local", *words)
    assert ran.code == 0, ran.err
    return digests(tmp_path / "local")


@pytest.mark.parametrize(
    "words",
    [
        ("--to", "gguf", "q8_0"),
        SPLIT,
        ("--to", "gptq", "w4g32", *CALIBRATED),
        ("--to", "awq", "w4g32", *CALIBRATED),
        ("--to", "int8", "w8a16"),
        ("--to", "bnb", "nf4"),
        ("--to", "onnx", "int8"),
        ("--to", "onnx", "int4", *CALIBRATED),
    ],
    ids=["gguf", "split", "gptq", "awq", "int8", "bnb", "onnx", "onnx, calibrated"],
)
def test_the_files_of_a_folder(
    bucket: Bucket, quantize: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    words: tuple[str, ...],
) -> None:  # fmt: skip
    """The same, lock included; nobody sees anything before all is up, and the lock comes last."""
    local = _local(quantize, tmp_path, *words)
    order: list[str] = []

    def see(method: str, asked: dict[str, Any]) -> None:
        if method in ("create_multipart_upload", "upload_part"):
            assert bucket.files() == {}
        if method in ("complete_multipart_upload", "put_object"):
            order.append(asked["Key"].rpartition("/")[2])

    watch(monkeypatch, see)
    ran = quantize(bucket.place, *words, "--json")
    assert ran.code == 0, ran.err
    assert [made["folder"] for made in json.loads(ran.out)] == [bucket.place]
    assert bucket.files() == local
    assert order[-1] == "pack.lock"
    assert bucket.uploads() == []
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (("--to", "gguf", "q8_0"), ("exporters.gguf.verify._FINE_DIVERGENCE", -1.0)),
        (("--to", "onnx", "fp32"), ("exporters.onnx.run.TOLERANCE", {"fp32": -1.0})),
    ],
    ids=["gguf", "onnx"],
)
def test_nothing_goes_before_it_is_compared(
    bucket: Bucket, quantize: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    words: tuple[str, ...], limit: tuple[str, Any],
) -> None:  # fmt: skip
    """A comparison that fails leaves nothing there; the same command goes on from the files."""
    if words[1] == "gguf":
        pytest.importorskip("xllamacpp")
    requests = counted(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(*limit)
        ran = quantize(bucket.place, *words)
        assert ran.code == 1
        assert "Traceback" not in ran.err
    assert not any(requests[method] for method in BEGUN)
    assert bucket.files() == {}
    held = [
        p
        for p in (tmp_path / "dist" / ".uploads").rglob("*")
        if p.suffix in (".gguf", ".onnx_data")
    ]
    assert held
    ran = quantize(bucket.place, *words)
    assert ran.code == 0, ran.err
    assert bucket.files() == _local(quantize, tmp_path, *words)


def test_the_disk_must_hold_what_is_held(
    bucket: Bucket, quantize: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of files that go up one by one a few must fit; of those that are compared first, all."""
    _local(quantize, tmp_path, *SPLIT)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "local").glob("*.gguf"))
    usage, room = shutil.disk_usage("/"), sum(sizes[-5:])
    assert room < sum(sizes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room))
    ran = quantize(bucket.place, *(word for word in SPLIT if word != "--no-verify"))
    assert ran.code == 1
    assert "GB free" in ran.err
    assert f"{bucket.place}: needs on its way" in ran.err
    assert "-o DIR" not in ran.err
    ran = quantize(bucket.place, *SPLIT)
    assert ran.code == 0, ran.err
    assert bucket.files() == digests(tmp_path / "local")


@pytest.mark.parametrize(
    ("method", "count"), [("upload_part", 3), ("complete_multipart_upload", 2)]
)
def test_killed_runs_go_on(
    bucket: Bucket, quantize: Callable[..., Ran], model: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, method: str, count: int,
) -> None:  # fmt: skip
    """SIGKILL while parts of a GGUF go up, and at the end: none is computed or sent again."""
    from mergekit_lite.merge.writer import ArtifactWriter

    local = _local(quantize, tmp_path, *SPLIT)
    parts = len(local) - 1
    words = ("quantize", model, "-o", bucket.place, *SPLIT)
    killed(DIE_IN_S3.format(method=method, count=count), *words, cwd=tmp_path)
    journal = json.loads(journal_below(tmp_path).read_text())
    finished = set(journal["shards"])
    states = journal["upload"]["uploads"]
    up = {name for name, state in states.items() if state.get("done") == "up"}
    assert len(up) == (2 if method == "upload_part" else parts)
    begun: list[str] = []
    begin = ArtifactWriter._begin
    monkeypatch.setattr(
        ArtifactWriter, "_begin", lambda self, shard: begun.append(shard.name) or begin(self, shard)
    )
    requests = counted(monkeypatch)
    ran = quantize(bucket.place, *SPLIT)
    assert ran.code == 0, ran.err
    assert f"continuing: {len(finished)} of {parts} output files" in ran.err
    assert set(begun) == set(local) - finished - {"pack.lock"}
    # The part that had arrived when it was killed is known by the listing of its upload.
    assert requests["upload_part"] == parts - len(up) - (method == "upload_part")
    assert bucket.files() == local
    assert bucket.uploads() == []


STOPPED_IN_A_PART = """
import signal, threading
from mergekit_lite.merge import destination, destination_s3
destination.LINGER = 0.0
made = destination_s3.S3Store._call
def call(self, method, **words):
    if method == "upload_part":
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()
    return made(self, method, **words)
destination_s3.S3Store._call = call
"""


def test_stopped_while_a_server_is_silent(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    """The process ends, though a part is under way that nobody takes."""
    words = [str(word) for word in ("quantize", model, "-o", bucket.place, *SPLIT)]
    code = (
        f"import os, sys\n{STOPPED_IN_A_PART}\nfrom mergekit_lite.cli import main\n"
        f"sys.argv = ['pack', *{words!r}]\nmain()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 130, ran.stderr
    assert "Run the same command to continue" in ran.stderr


def test_a_server_that_fails_while_held_files_go(
    bucket: Bucket, quantize: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was compared is compared again, for which its files stay until the commit."""
    split = tuple(word for word in SPLIT if word != "--no-verify")
    local = _local(quantize, tmp_path, *SPLIT)
    requests = counted(monkeypatch)

    def fail(method: str, _words: dict[str, Any]) -> None:
        if method == "upload_part" and requests[method] == 3:
            raise OSError("gone")

    with monkeypatch.context() as patch:
        watch(patch, fail)
        ran = quantize(bucket.place, *split)
    assert ran.code == 1
    assert "uploaded files are kept" in ran.err
    assert bucket.files() == {}
    assert len(list((tmp_path / "dist" / ".uploads").rglob("*.gguf"))) == len(local) - 1
    requests.clear()
    ran = quantize(bucket.place, *split)
    assert ran.code == 0, ran.err
    assert requests["upload_part"] == len(local) - 1 - 3
    _same_but_compared(bucket, local)
    assert bucket.uploads() == []
    assert not (tmp_path / "dist").exists()


def _same_but_compared(bucket: Bucket, local: dict[str, str]) -> None:
    """The files of a folder that was not compared, and a lock that says how these were."""
    found = bucket.files()
    key = "models/x/pack.lock"
    lock = json.loads(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())
    assert lock["verification"]
    assert found.pop("pack.lock") != local.pop("pack.lock")
    assert found == local


def test_from_unverified_to_verified(
    bucket: Bucket, quantize: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    """Files that went up unseen are made again where they are to be compared."""
    words = ("quantize", model, "-o", bucket.place, *SPLIT)
    killed(DIE_IN_S3.format(method="upload_part", count=3), *words, cwd=tmp_path)
    split = tuple(word for word in SPLIT if word != "--no-verify")
    assert quantize(bucket.place, *split).code == 0
    _same_but_compared(bucket, _local(quantize, tmp_path, *SPLIT))
    assert bucket.uploads() == []


def test_several(
    bucket: Bucket, quantize: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Below a prefix as below a folder; all are up before the first is shown."""
    several = (
        "--to",
        "gguf",
        "q8_0",
        "--to",
        "gguf",
        "f16",
        "--to",
        "int8",
        "w8a16",
        "--no-verify",
    )
    local = _local(quantize, tmp_path, *several)
    steps: list[str] = []
    watch(monkeypatch, lambda method, _: steps.append(method))
    ran = quantize(bucket.place, *several)
    assert ran.code == 0, ran.err
    assert bucket.files() == local
    for last in ("gguf-q8_0", "gguf-f16", "int8-w8a16"):
        assert f"→ {bucket.place}/{last}" in ran.out
    ends = [at for at, method in enumerate(steps) if method == "complete_multipart_upload"]
    assert "upload_part" not in steps[ends[1] :]
    assert quantize(bucket.place, *several).code == 1
    ran = quantize(f"hf://{REPO}", *several)
    assert ran.code == 2
    assert "a repository takes one result, not 3" in ran.err
    assert f"-o hf://{REPO}-gguf-q8_0" in ran.err


def test_a_scheme_of_two_names_is_made_once(quantize: Callable[..., Ran], tmp_path: Path) -> None:
    """`q4_k` is `q4_k_m`."""
    named = ("--to", "gguf", "q4_k", "--to", "gguf", "Q4_K_M", "--pure", "--no-verify")
    ran = quantize("local", *named)
    assert ran.code == 0, ran.err
    assert [path.name for path in sorted((tmp_path / "local").iterdir())] == [
        "pack.lock", "small-Q4_K_M.gguf",
    ]  # fmt: skip


def test_refusals(
    bucket: Bucket, quantize: Callable[..., Ran], pack: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Each before a model is opened, but for the input that would be lost."""
    q8 = ("--to", "gguf", "q8_0", "--no-verify")
    with monkeypatch.context() as patch:
        patch.setattr("mergekit_lite.merge.model.open_whole", None)
        for wrong in ("s3://bucket", "s3://bucket/../x", "gs://b/x", "hf://x"):
            ran = quantize(wrong, *q8)
            assert ran.code == 2
            assert "Write" in ran.err or "Give" in ran.err
        ran = quantize("s3://nobodys-bucket/x", *q8)
        assert ran.code == 1
        assert "there is no bucket 'nobodys-bucket'" in ran.err
        ran = quantize(f"{bucket.place}/x.gguf", *q8)
        assert ran.code == 2
        assert "--name x" in ran.err
        ran = quantize(bucket.place, "--to", "onnx", "fp32", "--link-weights")
        assert ran.code == 2
        assert "--link-weights links files of this disk" in ran.err
        bucket.put("theirs.txt")
        ran = quantize(bucket.place, *q8)
        assert ran.code == 1
        assert "already exists" in ran.err
        ran = quantize(bucket.place, *q8, "--force")
        assert ran.code == 1
        assert "holds 'theirs.txt', which pack did not write there" in ran.err
    assert list(bucket.files()) == ["theirs.txt"]
    bucket.client.delete_object(Bucket=bucket.name, Key="models/x/theirs.txt")
    assert quantize(bucket.place, "--to", "gptq", "w4g32", "--no-calibration").code == 0
    before = bucket.files()
    for over in (bucket.place, f"s3://{bucket.name}/models"):
        ran = pack("quantize", bucket.place, "-o", over, *q8, "--force", cwd=tmp_path)
        assert ran.code == 1
        assert f"holds the input {bucket.place}, which would be lost" in ran.err or (
            "which pack did not write there" in ran.err
        )
    assert bucket.files() == before
    assert not (tmp_path / "dist").exists()
    assert quantize(bucket.place, *q8, "--force").code == 0
    assert sorted(bucket.files()) == ["pack.lock", "small-Q8_0.gguf"]


def test_of_a_model_in_the_same_bucket(
    bucket: Bucket, pack: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    """From S3 to S3."""
    for path in model.iterdir():
        key = f"from/small/{path.name}"
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=path.read_bytes())
    words = ("--to", "gguf", "q8_0", "--no-verify")
    source = f"s3://{bucket.name}/from/small"
    ran = pack("quantize", source, *words, "-o", bucket.place, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert pack("quantize", source, *words, "-o", tmp_path / "local", cwd=tmp_path).code == 0
    assert bucket.files() == digests(tmp_path / "local")


def _to_hub(hub: HubServer, model: Path, tmp_path: Path, *words: object) -> Ran:
    """Quantize in a process that knows this Hub alone."""
    ran = subprocess.run(
        [sys.executable, "-m", "mergekit_lite", "quantize", model, "-o", f"hf://{REPO}", *words],
        cwd=tmp_path, env=hub_environment(hub, tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert "hf_xxx" not in ran.stdout + ran.stderr
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def test_to_the_hub(
    hub: HubServer, quantize: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    """One commit; a card that somebody wrote is not replaced by one of the result's own."""
    local = _local(quantize, tmp_path, *SPLIT)
    ran = _to_hub(hub, model, tmp_path, *SPLIT)
    assert ran.code == 0, ran.err
    assert f"→ hf://{REPO}/small-Q8_0-00001-of" in ran.out
    assert on_hub(hub, REPO) == local
    assert len(hub.repositories[REPO].commits) == 2
    hub.add(REPO, {".gitattributes": b"x", "README.md": b"card"})
    carded = ("--to", "onnx", "int8", "--force")
    ran = _to_hub(hub, model, tmp_path, *carded)
    assert ran.code == 1
    assert "holds 'README.md', which pack did not write there" in ran.err
    hub.add(REPO, {".gitattributes": b"x"})
    ran = _to_hub(hub, model, tmp_path, *carded)
    assert ran.code == 0, ran.err
    assert on_hub(hub, REPO) == _local(quantize, tmp_path, *carded)
