// The fields of a config are documented by the comments of its source: shown without a click.
document.querySelectorAll("details.mkdocstrings-source").forEach((block) => (block.open = true));
