"""The built-in world of coloured shapes: data that needs no download, and a checker that knows the truth.

A caption has four words (size, colour, shape, place); an image shows one shape on a plain light background.
This module re-exports the public names of its parts: drawing, checker, degrade, sources and tokenizers.
"""

from imagereward_jax.data.shapes.checker import check, fully_right, words_right
from imagereward_jax.data.shapes.drawing import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    WORDS,
    Caption,
    all_captions,
    draw,
    parse,
    split,
)
from imagereward_jax.data.shapes.sources import ShapesGroups, ShapesPairs
from imagereward_jax.data.shapes.tokenizers import (
    caption_words,
    write_bert_vocab,
    write_clip_tokenizer,
    write_t5_tokenizer,
)

__all__ = [
    "COLOURS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "WORDS",
    "Caption",
    "ShapesGroups",
    "ShapesPairs",
    "all_captions",
    "caption_words",
    "check",
    "draw",
    "fully_right",
    "parse",
    "split",
    "words_right",
    "write_bert_vocab",
    "write_clip_tokenizer",
    "write_t5_tokenizer",
]
