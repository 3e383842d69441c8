"""Textual-inversion embeddings in a pipeline: new words of its tokenizers, new rows of its text encoders' tables.

Ids and tables are those of diffusers' `load_textual_inversion`: a word of n vectors is n tokens, WORD, WORD_1, ....
"""

import copy
import dataclasses
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from imagereward_jax.pipelines.base import Params, TextToImage
from imagereward_jax.weights import mapping
from imagereward_jax.weights.embeddings import Embedding
from imagereward_jax.weights.files import WeightsError
from imagereward_jax.weights.sources import MixedSource, Source

_TABLES = ("text_model.embeddings.token_embedding.weight", "shared.weight")  # CLIP's, T5's
_MADE_FOR = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the second encoder of SDXL"}


def with_embeddings(pipeline: TextToImage, embeddings: Sequence[Embedding]) -> TextToImage:
    """Returns a pipeline whose prompts may hold the words of embeddings; `load_params` reads the tables with them.

    It is for sampling: `save` refuses it. T5 reads a word without vectors for it as plain text.

    Args:
        embeddings: those of one word, for several text encoders, may come from several files.

    Raises:
        WeightsError: naming the file: vectors of another width than the text encoders', or for too few of them, a word
            that the tokenizer knows already, more vectors than a prompt has tokens.
    """
    if not embeddings:
        return pipeline
    if pipeline.source is None or pipeline.embedded:
        raise WeightsError(
            f"{embeddings[0].path}: embeddings are added, all at once, to a model that is opened from files"
        )
    words = _by_word(pipeline, embeddings)
    configs, tokenizers, sources = {}, dict(pipeline.tokenizers), {}
    for encoder, tokenizer in pipeline.tokenizers.items():
        vectors = {word: parts[encoder] for word, parts in words.items() if encoder in parts}
        if not vectors:
            continue
        tokenizers[encoder] = WordTokenizer(tokenizer, {word: len(array) for word, array in vectors.items()})
        ids = [i for word in vectors for i in tokenizers[encoder].ids(word)]
        config = pipeline.configs[encoder]
        changes = {"vocab_size": max(config.vocab_size, max(ids) + 1)}
        if getattr(config, "eos_token_id", None) == 2:  # stands for the largest id, which is now another
            changes["eos_token_id"] = tokenizer.eos_token_id
        configs[encoder] = dataclasses.replace(config, **changes)
        rows = np.concatenate(list(vectors.values()))
        sources[encoder] = _ExtendedEncoder(pipeline.source, pipeline.networks[encoder], ids, rows)
    source = MixedSource(pipeline.source, sources, pipeline.source.parts)
    embedded = {word: {name: len(array) for name, array in parts.items()} for word, parts in words.items()}
    return pipeline.replaced(configs, source=source, tokenizers=tokenizers, embedded=embedded)


def embedding_notes(pipeline: TextToImage, prompts: Sequence[str]) -> list[str]:
    """Says, a line per word, how many vectors it has, who reads it as text, and whether a prompt has it at all."""
    notes = []
    for word, counts in pipeline.embedded.items():
        parts = [f"{count} vector{'s' * (count > 1)} for {name}" for name, count in counts.items()]
        parts += [f"plain text for {name}" for name in pipeline.text_encoders if name not in counts]
        if not any(word in prompt for prompt in prompts):
            parts.append(f"no prompt has the word {word}")
        notes.append(f"embedding {word}: {', '.join(parts)}")
    return notes


def _by_word(pipeline, embeddings):
    """{word: {encoder: vectors}}, each checked to fit."""
    words = {}
    for path, word, vectors in embeddings:
        parts = words.setdefault(word, {})
        for name, array in vectors.items():
            encoder = _encoder_of(pipeline, path, name, array)
            if encoder in parts:
                raise WeightsError(
                    f"{path}: {word!r} has vectors for {encoder} already; choose another word: FILE=WORD"
                )
            parts[encoder] = array
            _check_word(pipeline, path, word, encoder, len(array))
    paths = {embedding.token: embedding.path for embedding in embeddings}
    for word, parts in words.items():
        if clash := words.keys() & _tokens(word, max(map(len, parts.values())))[1:]:
            raise WeightsError(
                f"{paths[word]}: {min(clash)!r} is a vector of {word!r} and a word itself; choose another: FILE=WORD"
            )
        absent = [name for name in pipeline.trained_encoders if name not in parts]
        if absent:
            widths = ", ".join(str(_width(pipeline.configs[name])) for name in absent)
            raise WeightsError(
                f"{paths[word]}: {word!r} has no vectors for {', '.join(absent)} (of {widths} features), which this "
                f"model reads as well{_made_for(next(iter(parts.values())))}"
            )
    return words


def _encoder_of(pipeline, path, name, array):
    """The text encoder that vectors are for: the one that the file names, or the one of their width."""
    widths = {encoder: _width(pipeline.configs[encoder]) for encoder in pipeline.text_encoders}
    found = [encoder for encoder, width in widths.items() if width == array.shape[1] and name in ("", encoder)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(f"{encoder} {width}" for encoder, width in widths.items())
    if found:
        raise WeightsError(f"{path}: its vectors fit {' and '.join(found)}, and it does not say for which they are")
    raise WeightsError(
        f"{path}: vectors{f' for {name}' if name else ''} of {array.shape[1]} features, but this model's are {shown}"
        f"{_made_for(array)}"
    )


def _made_for(array):
    name = _MADE_FOR.get(array.shape[1])
    return f" (it seems to be made for {name})" if name else ""


def _width(config):
    return getattr(config, "hidden_size", None) or config.d_model


def _check_word(pipeline, path, word, encoder, count):
    known = pipeline.tokenizers[encoder].get_vocab()
    taken = [name for name in _tokens(word, max(count, 2)) if name in known]
    if taken:
        raise WeightsError(f"{path}: {taken[0]!r} is a token of {encoder} already; choose another word: FILE=WORD")
    most = pipeline.prompt_lengths[encoder] - 2
    if count > most:
        raise WeightsError(f"{path}: {count} vectors, but a prompt has {most} tokens")


def _tokens(word, count):
    return [word, *(f"{word}_{i}" for i in range(1, count))]


class WordTokenizer:
    """A tokenizer with more words, each of one token or several.

    Args:
        tokenizer: of transformers; a copy is made. words: the number of vectors of each.
    """

    def __init__(self, tokenizer: Any, words: Mapping[str, int]):
        self._tokenizer, self._words = copy.deepcopy(tokenizer), dict(words)
        self._tokenizer.add_tokens([token for word, count in words.items() for token in _tokens(word, count)])
        longest_first = sorted(words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def __call__(self, texts: str | Sequence[str], **options: Any) -> Mapping[str, Any]:
        alone = isinstance(texts, str)
        expanded = [self._pattern.sub(self._expand, text) for text in ([texts] if alone else texts)]
        return self._tokenizer(expanded[0] if alone else expanded, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def ids(self, word: str) -> list[int]:
        """The ids of a word's vectors, in order."""
        return self._tokenizer.convert_tokens_to_ids(_tokens(word, self._words[word]))

    def _expand(self, match):
        return " ".join(_tokens(match[0], self._words[match[0]]))


@dataclasses.dataclass(frozen=True)
class _ExtendedEncoder:
    """A text encoder's files with vectors [n, d] in the rows `ids` of its table. network: as it is in the files."""

    base: Source
    network: nnx.Module
    ids: list[int]
    vectors: np.ndarray

    def load(self, name: str, network: nnx.Module, target: Params) -> Params:
        """Loads the parameters, as `mapping.from_torch` does by `target`, whose leaves have no sharding."""
        layout = mapping.torch_layout(self.network)
        leaf = next(layout[key] for key in _TABLES if key in layout)
        wanted = functools.reduce(operator.getitem, leaf.path, target)
        stored = jax.ShapeDtypeStruct(leaf.shape, wanted.dtype)
        params = self.base.load(name, self.network, _replaced(target, leaf.path, stored))
        table = np.zeros(wanted.shape, wanted.dtype)
        table[: leaf.shape[0]] = functools.reduce(operator.getitem, leaf.path, params)
        table[self.ids] = self.vectors
        return _replaced(params, leaf.path, table)


def _replaced(tree, path, leaf):
    head, *rest = path
    return {**tree, head: _replaced(tree[head], rest, leaf) if rest else leaf}
