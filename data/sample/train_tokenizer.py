"""Train the tiny tokenizer on the sample's training text.

python -m data.sample.train_tokenizer --out medmax_jax/tiny/tokenizer.json

Byte-level BPE in the manner and layout of Chameleon's (see medmax_jax/models/tokenizer.py), over
the documents of images whose split is train: held-out wordings may need more tokens, as in
practice.
"""

from pathlib import Path

from medmax_jax import arguments
from medmax_jax.config import Vocab, build
from medmax_jax.configs import tiny
from medmax_jax.data.sample.documents import instruction_documents, pretraining_documents
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.models import tokenizer

MANIFEST = Path(__file__).parent / "manifest.jsonl"
SEED = 0  # of the documents' wordings


def main() -> None:
    """Read the flags, train, write, and load the written file."""
    parser = arguments.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    out = parser.parse_args().out
    vocab = build(Vocab, tiny.get_config().vocab)
    text = tokenizer.train(training_texts(), vocab)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    written = tokenizer.Tokenizer.from_file(out, vocab)
    print(f"{out}: sha256 {written.fingerprint}")


def training_texts() -> list[str]:
    """Return the text of every training document, in the order in which they are made."""
    rows = [r for r in read_manifest(MANIFEST) if r["split"] == "train"]
    documents = instruction_documents(rows, SEED) + pretraining_documents(rows, SEED)
    return [d["text"] for d in documents]


if __name__ == "__main__":
    main()
