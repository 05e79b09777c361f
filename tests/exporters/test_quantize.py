"""pack quantize --to gguf, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.gguf.imatrix import read_imatrix
from mergekit_lite.checkpoint.gguf import GgufCheckpoint
from mergekit_lite.errors import FileFormatError
from tests.conftest import digests, pack_process, write_recipe

Pack = Callable[..., Any]
TUNES = ("code", "docstrings", "reference")


@pytest.fixture(scope="session")
def models(example_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example models, out of reach of whatever else is below their folder."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", *TUNES, "lora-code"):
        (folder / name).symlink_to(example_models / name)
    return folder


def _ties(folder: Path, models: Path, **keys: object) -> Path:
    return write_recipe(
        folder / "a.yaml", "ties",
        {str(models / name): {"weight": 1.0, "density": 0.5} for name in TUNES},
        base_model=str(models / "base"), dtype="bfloat16", name="three", **keys,
    )  # fmt: skip


def _ggufs(folder: Path) -> dict[str, str]:
    return {n: d for n, d in digests(folder).items() if n.endswith(".gguf")}


def test_where_a_merge_was_just_made(pack: Pack, tmp_path: Path, models: Path) -> None:
    """As spelled; the file is what llama.cpp computes, and the lock says how that was found."""
    recipe = _ties(tmp_path, models)
    assert pack("merge", "ties", recipe.name, "-q", cwd=tmp_path).code == 0
    ran = pack("quantize", "--to", "gguf", "q4_k_m", cwd=tmp_path)
    assert ran.code == 0, ran.err
    folder = tmp_path / "dist" / "three" / "gguf-q4_k_m"
    assert f"→ {Path('dist/three/gguf-q4_k_m/three-Q4_K_M.gguf')}" in ran.out
    lock = json.loads((folder / "pack.lock").read_text())
    assert lock["kind"] == "quantize"
    assert lock["types"]["output.weight"] == "Q6_K"
    checked = lock["verification"]
    assert checked["by"].startswith("llama.cpp")
    assert checked["divergence"] < 0.05
    assert checked["top_token_agreement"] > 0.9
    assert checked["texts_tokenized_otherwise"] == []
    assert str(tmp_path) not in (folder / "three-Q4_K_M.gguf").read_bytes().decode("latin-1")


def test_of_a_recipe(pack: Pack, tmp_path: Path, models: Path) -> None:
    """A merge that has not run gives the bytes of one that has, and leaves no model behind."""
    recipe = _ties(tmp_path, models)
    for trim in ("tensor", "global"):
        recipe = _ties(tmp_path, models, parameters={"trim": trim})
        merged, one, two = (tmp_path / f"{what}-{trim}" for what in ("merged", "one", "two"))
        assert pack("merge", recipe, "-o", merged, "-q").code == 0
        words = ("quantize", "--to", "gguf", "q5_k_m", "--no-verify", "-q", "--name", "x")
        assert pack(*words, merged, "-o", one).code == 0
        ran = pack(*words, recipe, "-o", two)
        assert ran.code == 0, ran.err
        ours, theirs = GgufCheckpoint(one / "x-Q5_K_M.gguf"), GgufCheckpoint(two / "x-Q5_K_M.gguf")
        for name in ours.names():
            assert (ours.read(name) == theirs.read(name)).all()
        assert list(two.glob("*.safetensors")) == []
        lock = json.loads((two / "pack.lock").read_text())
        assert lock["recipe"]["merge_method"] == "ties"
        assert len(lock["inputs"]) == 4


def test_of_a_base_with_an_adapter(pack: Pack, tmp_path: Path, models: Path) -> None:
    both = f"{models / 'base'}+{models / 'lora-code'}"
    assert pack("merge", "adapter", both, "-o", tmp_path / "merged", "-q",
                "--dtype", "float32").code == 0  # fmt: skip
    words = ("quantize", "--to", "gguf", "f32", "-q", "--name", "x")
    assert pack(*words, tmp_path / "merged", "-o", tmp_path / "one").code == 0
    ran = pack(*words, both, "-o", tmp_path / "two")
    assert ran.code == 0, ran.err
    ours = GgufCheckpoint(tmp_path / "one" / "x-F32.gguf")
    theirs = GgufCheckpoint(tmp_path / "two" / "x-F32.gguf")
    for name in ours.names():
        assert (ours.read(name) == theirs.read(name)).all()
    ran = pack(*words, models / "lora-code", "-o", tmp_path / "three")
    assert ran.code == 1
    assert f"Write it after its base: {'.'}" not in ran.out
    assert "is an adapter, not a whole model" in ran.err


def test_several_at_once(pack: Pack, tmp_path: Path, models: Path) -> None:
    """The same bytes as one by one, with one thread or two, and in a second run."""
    base = models / "base"
    kinds = ("q4_k_m", "q8_0", "iq4_xs")
    words = ("quantize", "--no-verify", "-q", base)
    every = [word for kind in kinds for word in ("--to", "gguf", kind)]
    ran = pack(*words, *every, "-o", tmp_path / "all", "--threads", 2, "--memory", "64MB")
    assert ran.code == 0, ran.err
    for kind in kinds:
        alone = tmp_path / kind
        assert pack(*words, "--to", "gguf", kind, "-o", alone, "--threads", 1).code == 0
        assert digests(alone) == digests(tmp_path / "all" / f"gguf-{kind}")


def test_as_gguf_py_reads_it(pack: Pack, tmp_path: Path, models: Path) -> None:
    """Metadata and tensors, also in parts; what the card says is in the file."""
    folder = tmp_path / "model"
    shutil.copytree(models / "base", folder)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: org/first\ntags: [a, b]\nlanguage: en\n---\n# x\n"
    )
    words = ("quantize", "--to", "gguf", "q8_0", folder, "-q", "--name", "x")
    assert pack(*words, "-o", tmp_path / "one").code == 0
    ran = pack(*words, "-o", tmp_path / "parts", "--split-max-size", "600kB")
    assert ran.code == 0, ran.err
    reader = gguf.GGUFReader(tmp_path / "one" / "x-Q8_0.gguf")
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert found["general.license"] == "apache-2.0"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/org/first"
    assert found["general.tags"] == ["a", "b"]
    assert found["general.languages"] == ["en"]
    assert found["general.size_label"] == "2.2M"
    assert found["general.file_type"] == 7
    assert found["llama.block_count"] == 2
    parts = sorted((tmp_path / "parts").glob("*.gguf"))
    assert parts[0].name == f"x-Q8_0-00001-of-{len(parts):05}.gguf"
    whole = GgufCheckpoint(tmp_path / "one" / "x-Q8_0.gguf")
    split = GgufCheckpoint(parts[1])
    assert whole.names() == split.names()
    for name in whole.names():
        assert (whole.read(name) == split.read(name)).all()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == set(whole.names())
    assert (tensors["output_norm.weight"].data == whole.read("output_norm.weight")).all()


def test_killed_runs(tmp_path: Path, models: Path) -> None:
    """SIGKILL while parts are written; nothing is under the final name until all is there."""
    out, journal = tmp_path / "killed", tmp_path / ".killed.journal"
    words = (
        "quantize", "--to", "gguf", "q4_k_m", str(models / "base"), "-o", str(out), "-q",
        "--no-verify", "--name", "x", "--split-max-size", "200kB",
    )  # fmt: skip
    for attempt in range(4):
        process = pack_process(*words, cwd=tmp_path)
        while process.poll() is None and (attempt % 2 == 0 or not journal.exists()):
            if attempt % 2 == 0 and (tmp_path / ".killed.partial").exists():
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if out.exists():
            shutil.rmtree(out)
    ran = pack_process(*words, cwd=tmp_path)
    _, err = ran.communicate()
    assert ran.returncode == 0, err
    whole = tmp_path / "whole"
    again = pack_process(*words[:5], "-o", str(whole), *words[7:], cwd=tmp_path)
    assert again.wait() == 0
    assert _ggufs(out) == _ggufs(whole)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".killed")] == []


def test_again(pack: Pack, tmp_path: Path, models: Path) -> None:
    """A GGUF file is quantized once more: what is float gives the same bytes as the model."""
    base = models / "base"
    words = ("quantize", "--no-verify", "--name", "x")
    assert pack(*words, base, "--to", "gguf", "f32", "-o", tmp_path / "wide").code == 0
    assert pack(*words, base, "--to", "gguf", "q4_k_m", "-o", tmp_path / "one").code == 0
    ran = pack(*words, tmp_path / "wide" / "x-F32.gguf", "--to", "gguf", "q4_k_m",
               "-o", tmp_path / "two")  # fmt: skip
    assert ran.code == 0, ran.err
    ours = GgufCheckpoint(tmp_path / "one" / "x-Q4_K_M.gguf")
    theirs = GgufCheckpoint(tmp_path / "two" / "x-Q4_K_M.gguf")
    assert ours.values.keys() == theirs.values.keys()
    for name in ours.names():
        assert ours.stored(name) == theirs.stored(name)
        assert (ours.read(name) == theirs.read(name)).all()
    ran = pack(*words, tmp_path / "one", "--to", "gguf", "q8_0", "-o", tmp_path / "three")
    assert ran.code == 0, ran.err
    assert "is quantized already (Q4_K, Q6_K)" in ran.err


def test_compared_with_the_model(pack: Pack, tmp_path: Path, models: Path) -> None:
    """pack diff of a model and its file: nothing in float32, a little in 4 bits."""
    base = models / "base"
    words = ("quantize", "--no-verify", "-q", "--name", "x", base)
    for kind in ("f32", "q4_k_m"):
        assert pack(*words, "--to", "gguf", kind, "-o", tmp_path / kind).code == 0
    ran = pack("diff", base, tmp_path / "f32", tmp_path / "q4_k_m", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert len(found["tensors"]) == 21
    for tensor in found["tensors"].values():
        exact, coarse = tensor["relative_change"]
        assert exact == 0
        assert coarse < 0.15


def _importance(path: Path, columns: dict[str, int]) -> Path:
    """An importance matrix in both of llama.cpp's forms."""
    random = np.random.default_rng(0)
    sums = {n: np.abs(random.standard_normal(c)).astype(np.float32) for n, c in columns.items()}
    with path.with_suffix(".dat").open("wb") as file:
        file.write(np.int32(len(sums)).tobytes())
        for name, values in sums.items():
            file.write(np.int32(len(name)).tobytes() + name.encode())
            file.write(np.array([5, values.size], np.int32).tobytes() + values.tobytes())
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[5.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_importance(pack: Pack, tmp_path: Path, models: Path) -> None:
    """Both forms say the same; types that need one get it; one of another model is refused."""
    names = [f"blk.{i}.{part}.weight" for i in range(2) for part in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")]  # fmt: skip
    columns = dict.fromkeys(names, 256) | {f"blk.{i}.ffn_down.weight": 512 for i in range(2)}
    path = _importance(tmp_path / "m.gguf", columns)
    new, old = read_imatrix(path), read_imatrix(path.with_suffix(".dat"))
    assert new.keys() == old.keys() == columns.keys()
    assert all((new[n] == old[n]).all() for n in new)
    words = ("quantize", models / "base", "--to", "gguf", "iq2_xs", "--no-verify")
    ran = pack(*words, "-o", tmp_path / "none")
    assert ran.code == 1
    assert "needs an importance matrix" in ran.err
    ran = pack(*words, "-o", tmp_path / "out", "--imatrix", path)
    assert ran.code == 0, ran.err
    other = _importance(tmp_path / "other.gguf", {"blk.0.attn_q.weight": 128})
    ran = pack(*words, "-o", tmp_path / "other", "--imatrix", other)
    assert ran.code == 1
    assert "128 values, the model's tensor has 256 columns" in ran.err
    for content in (b"", b"\5\0\0\0", b"GGUF", path.with_suffix(".dat").read_bytes()[:90]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(FileFormatError):
            read_imatrix(tmp_path / "broken")


@pytest.fixture
def copy(tmp_path: Path, models: Path) -> Iterator[Path]:
    """A model of one's own to break."""
    folder = tmp_path / "copy"
    shutil.copytree(models / "base", folder)
    return folder


def _changed(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _with(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor.view(-1)[7] = value
    return tensor


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_cannot_be_stored(pack: Pack, copy: Path, value: float) -> None:
    """Named, and nothing is written."""
    name = "model.layers.1.mlp.up_proj.weight"
    _changed(copy, name, lambda t: _with(t.float(), value))
    out = copy.parent / "out"
    ran = pack("quantize", copy, "--to", "gguf", "q4_k_m", "-o", out)
    assert ran.code == 1
    assert "'blk.1.ffn_up.weight' holds " in ran.err
    assert not out.exists()
    if value == 1e30:
        ran = pack("quantize", copy, "--to", "gguf", "bf16", "-o", out, "--no-verify")
        assert ran.code == 0, ran.err


def _config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_models_that_have_no_gguf(pack: Pack, copy: Path, tmp_path: Path) -> None:
    """One error each, before weights are read."""
    words = ("quantize", copy, "--to", "gguf", "q4_k_m", "-o", tmp_path / "out")
    config = (copy / "config.json").read_text()

    def refused(message: str) -> None:
        ran = pack(*words)
        assert ran.code == 1, ran.out
        assert message in ran.err
        assert "Traceback" not in ran.err
        (copy / "config.json").write_text(config)

    _config(copy, model_type="llamma")
    refused("models of type 'llamma' have no GGUF here; did you mean 'llama'?")
    _config(copy, model_type="mamba")
    refused("Known types: bert, cohere, falcon")
    _config(copy, hidden_act="relu")
    refused("gives 'hidden_act' as 'relu'")
    _config(copy, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    refused("scales rotary embeddings by 'dynamic'")
    _config(copy, num_hidden_layers=3)
    refused("lacks 'blk.2.attn_k.weight'")
    tokenizer = (copy / "tokenizer.json").read_text()
    document = json.loads(tokenizer)
    document["model"]["merges"] = []
    (copy / "tokenizer.json").write_text(json.dumps(document))
    refused("has no merges")
    (copy / "tokenizer.json").unlink()
    refused("has no tokenizer (")
    (copy / "tokenizer.json").write_text(tokenizer)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        _changed(copy, name, lambda t: t[:2000])
    refused("its tokenizer has ids up to 2047, its embedding has 2000 rows")


def test_more_rows_than_tokens(pack: Pack, copy: Path, tmp_path: Path) -> None:
    """An embedding that was padded: unused tokens, as documented."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        _changed(copy, name, lambda t: torch.cat([t, t[:64]]))
    _config(copy, vocab_size=2112)
    ran = pack("quantize", copy, "--to", "gguf", "q8_0", "-o", tmp_path / "out", "--name", "x")
    assert ran.code == 0, ran.err
    values = GgufCheckpoint(tmp_path / "out" / "x-Q8_0.gguf").values
    assert len(values["tokenizer.ggml.tokens"]) == 2112
    assert values["tokenizer.ggml.tokens"][2048] == "[PAD2048]"


def test_rows_that_do_not_fit(pack: Pack, tmp_path: Path, models: Path) -> None:
    """A type with smaller blocks stands in, as llama-quantize has it; asked for, it is refused."""
    words = ("quantize", models / "base", "--to", "gguf", "q4_k_m", "--no-verify")
    from exporters.gguf.mixtures import Facts, choose_types, find_mixture

    shapes = {"blk.0.ffn_up.weight": (4, 288), "blk.0.ffn_gate.weight": (4, 40)}
    found = choose_types(shapes, Facts("llama", 1, 1, 1), find_mixture("q4_k_m"))
    assert [kind.name for kind in found.values()] == ["Q5_0", "F16"]
    ran = pack(*words, "--tensor-type", "attn_v=q9_k", "-o", tmp_path / "out")
    assert ran.code == 1
    assert "no type of a tensor" in ran.err
    ran = pack(*words, "--tensor-type", "attn_v", "-o", tmp_path / "out")
    assert ran.code == 2
    ran = pack(*words, "--tensor-type", "attn_v=q8_0", "-o", tmp_path / "out", "--name", "x")
    assert ran.code == 0, ran.err
    assert GgufCheckpoint(tmp_path / "out" / "x-Q4_K_M.gguf").stored("blk.1.attn_v.weight")[0] == (
        "Q8_0"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say what to make"),
        (("--to", "guf", "q4_0"), "no such format 'guf'; did you mean 'gguf'?"),
        (("--to", "gguf"), "requires 2 arguments"),
        (("--to", "gguf", "q8_0", "-o", "x.gguf"), "-o names a folder"),
        (("--to", "gguf", "q8_0", "--name", "a/b"), "no name of a file"),
        (("--to", "gguf", "q8_0", "--tensor-type", "(=q8_0"), "no regular expression"),
    ],
)
def test_wrong_usage(
    pack: Pack, tmp_path: Path, models: Path, words: tuple[str, ...], message: str
) -> None:
    ran = pack("quantize", models / "base", *words, cwd=tmp_path)
    assert ran.code == 2
    assert message in ran.err


def test_nothing_to_quantize(pack: Pack, tmp_path: Path, models: Path) -> None:
    """No model made here, a scheme that is none, a result that is there already."""
    ran = pack("quantize", "--to", "gguf", "q4_k_m", cwd=tmp_path)
    assert ran.code == 1
    assert "no model was made here yet" in ran.err
    ran = pack("quantize", "--to", "gguf", "q4_k_n", models / "base", cwd=tmp_path)
    assert ran.code == 1
    assert "did you mean 'q4_k_" in ran.err
    words = ("quantize", "--to", "gguf", "q8_0", models / "base", "--no-verify", "-q")
    assert pack(*words, cwd=tmp_path).code == 0
    ran = pack(*words, cwd=tmp_path)
    assert ran.code == 1
    assert "already exists" in ran.err
    assert pack(*words, "--force", cwd=tmp_path).code == 0


def test_a_full_disk(tmp_path: Path, models: Path) -> None:
    """One error, and nothing under the final name."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no tmpfs may be mounted here")
    try:
        process = pack_process("quantize", "--to", "gguf", "q8_0", str(models / "base"),
                               "-o", str(disk / "out"), cwd=tmp_path)  # fmt: skip
        _, err = process.communicate()
        assert process.returncode == 1
        assert "its disk has" in err
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_without_llama_cpp(
    pack: Pack, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified by dequantizing instead, and the lock says so."""
    import exporters.gguf.verify as module

    found = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda n: None if n == "xllamacpp" else found(n))
    ran = pack("quantize", "--to", "gguf", "q4_k_m", models / "base", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "verified by dequantizing" in ran.out
    lock = json.loads((tmp_path / "out" / "pack.lock").read_text())
    assert lock["verification"]["by"] == "dequantizing"
    assert 0 < lock["verification"]["largest_relative_error"] < 0.2


def test_experts_of_a_merge(pack: Pack, tmp_path: Path) -> None:
    """Stacked and split experts, out of a merge that has not run, are those of one that has."""
    import transformers

    sizes = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 300,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    from tests.exporters.test_gguf_tokenizers import _files

    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
        model.save_pretrained(tmp_path / name)
        for file, content in _files().items():
            (tmp_path / name / file).write_bytes(content)
    recipe = write_recipe(
        tmp_path / "a.yaml", "ties", {"a": {"weight": 1, "density": 0.3}, "b": {"weight": 1}},
        base_model="base", dtype="float32",
    )  # fmt: skip
    assert pack("merge", recipe, "-o", tmp_path / "merged", "-q").code == 0
    words = ("quantize", "--to", "gguf", "f32", "--no-verify", "--name", "x", "-q")
    assert pack(*words, tmp_path / "merged", "-o", tmp_path / "one").code == 0
    ran = pack(*words, recipe, "-o", tmp_path / "two")
    assert ran.code == 0, ran.err
    ours, theirs = (GgufCheckpoint(tmp_path / n / "x-F32.gguf") for n in ("one", "two"))
    assert ours.spec("blk.0.ffn_up_exps.weight").shape == (3, 64, 64)
    for name in ours.names():
        assert (ours.read(name) == theirs.read(name)).all(), name


def test_no_thread_and_no_seed_in_the_file(pack: Pack, tmp_path: Path, models: Path) -> None:
    """Nothing of the machine or of the time is in a result."""
    os.environ.setdefault("USER", "somebody")
    words = ("quantize", "--to", "gguf", "q6_k", models / "base", "-q", "--name", "x")
    assert pack(*words, "-o", tmp_path / "one").code == 0
    assert pack(*words, "-o", tmp_path / "two").code == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
