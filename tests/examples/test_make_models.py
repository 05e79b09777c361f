"""The example models: what they promise to whoever merges them."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import corpus  # noqa: E402
import make_models  # noqa: E402
import perplexity  # noqa: E402

HARD_TEXT = "def naïve(x):\n\treturn '  日本語 🙂\\u00e9'  # \r\n\x00  <|x|> [ n't ]  .\n"


@pytest.fixture(scope="module")
def models() -> Path:
    """The folder of `make test`, made first where it is missing."""
    run_maker()
    return EXAMPLES / "models"


def run_maker(*arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / "make_models.py"), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    return done.stdout


@pytest.fixture(scope="module")
def recorded(models) -> dict[str, dict[str, float]]:
    return json.loads((models / "perplexity.json").read_text())["perplexity"]


def test_second_run_does_nothing(models):
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    assert run_maker().startswith("example models are up to date in ")
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before


def test_a_run_with_nothing_to_do_waits_for_no_other(models):
    descriptor = os.open(models.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert run_maker().startswith("example models are up to date in ")
    finally:
        os.close(descriptor)


def test_up_to_date_check_imports_no_torch(models):
    code = (
        "import sys, pathlib, make_models; "
        f"assert make_models.is_current(pathlib.Path({str(models)!r})); "
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EXAMPLES)


def test_a_lost_file_makes_the_models_out_of_date(models, tmp_path):
    (tmp_path / make_models.STAMP).write_bytes((models / make_models.STAMP).read_bytes())
    assert not make_models.is_current(tmp_path)


def test_a_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_maker("--force", "--out", str(tmp_path))
    assert "was not made by this script" in caught.value.stderr
    assert (tmp_path / "thesis.txt").exists()


def test_an_interrupted_run_leaves_the_old_folder(tmp_path):
    out = tmp_path / "models"
    out.mkdir()
    (out / "old").touch()

    def interrupted() -> None:
        with make_models.replacing(out) as fresh:
            (fresh / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "models",
        "models/old",
    ]


@pytest.mark.parametrize("name", ["base", *corpus.DOMAINS])
def test_shape_is_one_that_block_quantization_takes(models, name):
    config = json.loads((models / name / "config.json").read_text())
    assert config["hidden_size"] == 256
    assert config["intermediate_size"] % 256 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["dtype"] == "bfloat16"


def test_tokenizer_round_trips_and_knows_its_specials(models):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    ids = tokenizer(HARD_TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == HARD_TEXT
    assert len(tokenizer) == corpus.VOCABULARY
    assert tokenizer.convert_tokens_to_ids(list(corpus.SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_chat_template(models):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "code")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == ("<|begin|><|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n")
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert [i for i in ids if i < 6] == [0, 3, 1, 4, 1, 5]


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_each_domain_gains_from_its_own_training(recorded, domain):
    base = recorded["base"][domain]
    assert recorded[domain][domain] < 0.9 * base
    assert recorded[f"lora-{domain}"][domain] < 0.98 * base


@pytest.mark.parametrize("name", ["base", "lora-reference"])
def test_recorded_perplexity_is_reproduced(models, recorded, name):
    assert perplexity.held_out_perplexity(models / name) == pytest.approx(recorded[name], rel=1e-4)


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_adapters_load_in_peft_and_name_their_base(models, domain):
    from peft import PeftModel

    model, _ = perplexity.load(models / f"lora-{domain}")
    assert isinstance(model, PeftModel)
    config = model.peft_config["default"]
    assert config.base_model_name_or_path == "../base"
    assert (config.use_rslora, config.use_dora) == (domain == "docstrings", domain == "reference")
    # A B of zeros is an adapter that was never trained.
    assert all(value.abs().max() > 0 for key, value in model.named_parameters() if "lora_B" in key)


def test_no_file_names_a_folder_of_this_machine(models):
    for path in models.rglob("*"):
        if path.suffix in {".json", ".md", ".jinja"} and path.name != "tokenizer.json":
            text = path.read_text()
            assert str(EXAMPLES) not in text, path
            assert "/fresh/" not in text, path


def test_held_out_text_is_not_trained_on():
    kept_back = [text for texts in corpus.held_out().values() for text in texts]
    trained = "\n".join(text for texts in corpus.training().values() for text in texts)
    paragraphs = [p.strip() for text in kept_back for p in text.split("\n\n")]
    long_ones = [paragraph for paragraph in paragraphs if len(paragraph) >= 200]
    assert len(long_ones) > 50
    assert sum(paragraph in trained for paragraph in long_ones) == 0


def test_split_source_parts_code_and_prose():
    source = '"""Top."""\n# gone\ndef f():\n    """Doc.\n\n    More."""\n\nx = "kept"  # gone\n'
    code, prose = corpus.split_source(source)
    assert code == "def f():\n    pass\nx = 'kept'"
    assert prose == "Top.\n\nDoc.\n\nMore."


def test_table_marks_the_lowest_of_each_column():
    text = perplexity.table({"base": {"code": 9.0, "prose": 5.0}, "ties": {"code": 8.0}})
    assert text.splitlines() == [
        "model        code        prose",
        "base         9.00         5.00*",
        "ties         8.00*           -",
    ]
