"""Three domains of text that ship with every Python, and a vocabulary made of them.

`code` is the standard library with its comments and docstrings removed, `docstrings` is the prose
that was removed, `reference` is the language reference that `help("for")` shows. Nothing is
downloaded. Each document belongs wholly to the training text or wholly to the held-out text, by
the hash of its name, so that neither the order of a folder nor the seed of Python's own hash
decides anything.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerFast

DOMAINS = ("code", "docstrings", "reference")
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 2048
MAX_LENGTH = 512  # tokens

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Characters of a domain, and of one document in it, so that no document becomes most of a domain.
TRAINING_CAP, TRAINING_DOCUMENT_CAP = 1_000_000, 20_000
HELD_OUT_CAP, HELD_OUT_DOCUMENT_CAP = 50_000, 4_000

# Folders that some distributions split off, that hold tables rather than code, or tests.
SKIPPED_FOLDERS = (
    "__pycache__ config- distutils encodings ensurepip idlelib lib-dynload lib2to3 pydoc_data "
    "site-packages dist-packages test tests tkinter turtledemo venv"
)
# Generated when Python was built or nothing but a table.
SKIPPED_FILES = ("_sysconfigdata", "html/entities.py", "stringprep.py", "turtle.py")


def digest(name: str) -> bytes:
    """Return the SHA-256 of a document's name: its place in every order, its side of the split."""
    return hashlib.sha256(name.encode()).digest()


def is_held_out(name: str) -> bool:
    """Say whether the document is kept from training (one in five)."""
    return digest(name)[-1] % 5 == 0


def library_files() -> list[tuple[str, Path]]:
    """Return (name relative to the library, path) of the modules, ordered by `digest`.

    Raises:
        FileNotFoundError: if this Python ships without its library's sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = SKIPPED_FOLDERS.split()
    names = []
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        name = path.relative_to(root).as_posix()
        if not (
            name.startswith(SKIPPED_FILES)
            or any(folder in skipped or folder.startswith("config-") for folder in folders)
        ):
            names.append(name)
    if not names:
        raise FileNotFoundError(f"no Python sources in {root}: the examples train on them")
    return [(name, root / name) for name in sorted(names, key=digest)]


def split_source(source: str) -> tuple[str, str]:
    """Part a module into its code without comments and docstrings, and its docstrings' prose."""
    tree = ast.parse(source)
    prose = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring is not None:
            prose.append(inspect.cleandoc(docstring))
            node.body = node.body[1:] or [ast.Pass()]
    # `unparse` writes no comments: the tree holds none.
    return ast.unparse(tree), "\n\n".join(prose)


def documents(wanted: Callable[[str], bool], cap: int, each: int) -> dict[str, list[str]]:
    """Gather the documents whose name is wanted.

    Args:
        wanted: says of a name whether its document is taken.
        cap: characters after which a domain takes no further document.
        each: characters of one document at which it is cut.

    Returns:
        The texts by domain, in the order of `digest`.
    """
    from pydoc_data.topics import topics

    found: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    size = dict.fromkeys(DOMAINS, 0)

    def add(domain: str, text: str) -> None:
        text = text.strip()[:each]
        if text and size[domain] < cap:
            found[domain].append(text)
            size[domain] += len(text)

    for name in sorted(filter(wanted, topics), key=digest):
        add("reference", topics[name])
    for name, path in library_files():
        if min(size["code"], size["docstrings"]) >= cap:
            break
        if wanted(name):
            code, prose = split_source(path.read_text(encoding="utf-8"))
            add("code", code)
            add("docstrings", prose)
    return found


def held_out() -> dict[str, list[str]]:
    """Return the documents of each domain on which perplexity is measured."""
    return documents(is_held_out, HELD_OUT_CAP, HELD_OUT_DOCUMENT_CAP)


def training() -> dict[str, list[str]]:
    """Return the documents of each domain to train on, without a paragraph of `held_out`.

    Topics of the reference quote one another and modules of the library share methods, so a split
    by name alone would leave some held-out paragraphs in the training text.
    """
    kept_back = {
        paragraph for texts in held_out().values() for text in texts for paragraph in _long(text)
    }
    found = documents(lambda name: not is_held_out(name), TRAINING_CAP, TRAINING_DOCUMENT_CAP)
    return {
        domain: [
            "\n\n".join(part for part in text.split("\n\n") if part.strip() not in kept_back)
            for text in texts
        ]
        for domain, texts in found.items()
    }


def _long(text: str) -> Iterator[str]:
    """Yield the paragraphs that are long enough to be recognised as the same text."""
    return (part.strip() for part in text.split("\n\n") if len(part.strip()) >= 60)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE vocabulary with a chat template, as GPT-2's and Llama 3's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin, end, pad, *roles = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        extra_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
