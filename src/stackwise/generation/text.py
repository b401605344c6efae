"""Text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.generation.autoregressive import generate, pad_prompts
from stackwise.generation.sampling import Draw
from stackwise.kinds import OBJECTIVES, samplers
from stackwise.model.architecture import Rack

_INCOMPLETE = "\ufffd"
"""What a tokenizer gives for bytes that are no character, or not yet."""


def stream_text(
    rack: Rack,
    tokenizer: Tokenizer,
    config: StackWiseConfig,
    prompt: str,
    n_tokens: int,
    *,
    seed: int = 0,
    stop: Sequence[str] = (),
    **draw: Unpack[Draw],
) -> Iterator[str]:
    """Yields what follows ``prompt`` piece by piece; as ``stream_texts`` of this prompt alone."""
    steps = stream_texts(rack, tokenizer, config, [prompt], n_tokens, seed=seed, stop=stop, **draw)
    return (piece for (piece,) in steps if piece)


def stream_texts(
    rack: Rack,
    tokenizer: Tokenizer,
    config: StackWiseConfig,
    prompts: Sequence[str],
    n_tokens: int,
    *,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    **draw: Unpack[Draw],
) -> Iterator[list[str]]:
    """Yields a piece of what follows each prompt, often empty, until all have ended.

    A text ends after ``n_tokens``, at the end of the document, or just before the first occurrence of a ``stop`` text
    in what is generated. Pieces hold whole characters, and nothing that may yet become a stop text.

    Args:
        prompts: an empty one starts a document.
        seed, draw: as for ``generate``.

    Raises:
        UserError: at the call, for a masked model, a prompt that the tokenizer cannot write, and settings that do not
            fit.
    """
    if OBJECTIVES[config.training.objective].sampler != "continuation":
        raise UserError(
            f"this run was trained with {config.training.objective}, which does not go on from a prompt; generate "
            f"needs {' or '.join(samplers('continuation'))}"
        )
    return stream_after(
        rack, tokenizer, [[tokenizer.end_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts], n_tokens,
        seed=seed, stop=stop, **draw,
    )  # fmt: skip


def stream_after(
    rack: Rack,
    tokenizer: Tokenizer,
    starts: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    **draw: Unpack[Draw],
) -> Iterator[list[str]]:
    """As ``stream_texts``, of a causal Rack, after the tokens of each of ``starts``, of which there is at least one."""
    if "" in stop:
        raise UserError("stop: an empty text is not allowed; give at least one character")
    never = tokenizer.special_ids - {tokenizer.end_id}
    never |= frozenset(range(tokenizer.vocab_size, rack.vocab_size))  # rows of the head that no token has
    try:
        # padding is masked: any token will do
        ids, mask = pad_prompts(starts, tokenizer.end_id)
        steps = generate(
            rack, ids.to(rack.device), n_tokens, seed=seed, stop_ids={tokenizer.end_id}, suppressed_ids=never,
            attention_mask=mask.to(rack.device), **draw,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    return _pieces([_Text(tokenizer, start, stop) for start in starts], steps)


def _pieces(texts: Sequence[_Text], steps: Iterator[Tensor]) -> Iterator[list[str]]:
    for chosen in steps:
        yield [text.push(token) for text, token in zip(texts, chosen.tolist())]
        if all(text.ended for text in texts):
            return
    yield [text.close() for text in texts]


class _Text:
    """A text that grows token by token and ends before the first stop text.

    The occurrence that is complete first ends it (of several, the longest), wherever the borders of tokens fall.
    """

    def __init__(self, tokenizer: Tokenizer, start: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        # Tokenizers whose tokens hold the space before a word drop it at the beginning of what they decode: new tokens
        # are decoded behind those that gave the piece before (_context, out of _ids), whose text is then cut off.
        self._ids = list(start)
        self._context = len(self._ids)
        self._held = ""
        self.ended = False

    def push(self, token: int) -> str:
        """What is certain to be shown after ``token``."""
        if self.ended:
            return ""
        if token == self._tokenizer.end_id:
            return self.close()
        self._ids.append(token)
        before, text = self._decoded()
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._ids, self._context = self._ids[self._context :], len(self._ids) - self._context
        return self._release(text[len(before) :])

    def close(self) -> str:
        """What is left when no token follows."""
        if self.ended:
            return ""
        before, text = self._decoded()
        shown = self._release(text[len(before) :]) + self._held
        self.ended = True
        return shown

    def _decoded(self) -> tuple[str, str]:
        return self._tokenizer.decode(self._ids[: self._context]), self._tokenizer.decode(self._ids)

    def _release(self, more: str) -> str:
        """The part of the held text and ``more`` that no stop text can reach; the rest is held."""
        text = self._held + more
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)[1]]
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        keep = next((n for n in range(min(longest, len(text)), 0, -1) if self._may_become_stop(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _may_become_stop(self, end: str) -> bool:
        return any(len(end) < len(stop) and stop.startswith(end) for stop in self._stop)
