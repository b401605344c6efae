import itertools
import random

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import ByteTokenizer, CharacterTokenizer, LibraryTokenizer
from stackwise.errors import UserError
from stackwise.generation import text as text_module
from stackwise.generation.text import stream_text, stream_texts
from stackwise.model.architecture import create_block_spec, create_rack_from_specs

CAUSAL = StackWiseConfig.from_dict({"model": {"attention_preset": "gpt_style"}})
BYTES = ByteTokenizer()
LETTERS = CharacterTokenizer("abcdefgh \n")
POEM = "Grüße, 世界! a\nb\n\nc 🜁 STOP d"


def rack(vocab_size, learned=None, seed=3):
    """A Rack of random choices among the whole vocabulary."""
    block = create_block_spec(28, 19, 2, 1)
    stacks = [{"stack_id": 0, "n_blocks": 1, "block_spec": block}]
    made = create_rack_from_specs(vocab_size, 28, stacks, learned_positions=learned, seed=seed)
    with torch.no_grad():
        made.embedding.weight.mul_(50)
        made.head.weight.mul_(20)
        made.head.weight[:2] = 0  # documents end late
    return made.eval()


def scripted(monkeypatch, tokenizer, *texts):
    """Makes the model say ``texts``, one for each prompt, then the end of the document."""
    ids = [[*tokenizer.encode(one).tolist(), tokenizer.end_id] for one in texts]

    def generate(rack, prompt, n_tokens, **settings):
        assert prompt.shape[0] == len(texts)
        for step in range(min(n_tokens, max(map(len, ids)))):
            yield torch.tensor([row[min(step, len(row) - 1)] for row in ids])

    monkeypatch.setattr(text_module, "generate", generate)


def pieces(tokenizer=BYTES, prompt="", n=1000, **settings):
    return list(stream_text(rack(tokenizer.vocab_size), tokenizer, CAUSAL, prompt, n, **settings))


def joined(model, tokenizer, prompts, n=23, **settings):
    return ["".join(row) for row in zip(*stream_texts(model, tokenizer, CAUSAL, prompts, n, **settings))]


def test_pieces_are_whole_characters_and_together_the_text(monkeypatch):
    scripted(monkeypatch, BYTES, POEM)
    assert pieces() == list(POEM)


def test_bytes_that_are_no_character_are_shown_as_such_at_the_end(monkeypatch):
    scripted(monkeypatch, BYTES, "ab世")
    assert pieces(n=4) == ["a", "b", "\ufffd"]


@pytest.mark.parametrize(
    "stop, expected",
    [
        (["STOP"], "Grüße, 世界! a\nb\n\nc 🜁 "),
        (["\n\n"], "Grüße, 世界! a\nb"),
        (["\n"], "Grüße, 世界! a"),
        (["界", "世界"], "Grüße, "),  # both are complete at 界: the longer one counts
        (["世界!", "界"], "Grüße, 世"),  # 界 is complete before 世界!
        (["b\n\nc x", "\n\nc"], "Grüße, 世界! a\nb"),  # what only began to be a stop text is shown
        (["STOPS", "dd"], POEM),
        (["G"], ""),
        ([POEM], ""),
        ([POEM + "!"], POEM),
        (["🜁 STOP d"], "Grüße, 世界! a\nb\n\nc "),
    ],
)
@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_text_ends_before_the_first_stop_text_wherever_tokens_end(monkeypatch, stop, expected, width):
    tokenizer = Chunks(width)
    scripted(monkeypatch, tokenizer, POEM)
    got = pieces(tokenizer, stop=stop)
    assert "".join(got) == expected
    for shown in itertools.accumulate(got):
        assert expected.startswith(shown)


def test_texts_end_where_letter_by_letter_a_stop_text_is_first_complete(monkeypatch):
    draw = random.Random(3)
    texts = ["".join(draw.choices("abc", k=draw.randint(0, 23))) for _ in range(100)]
    ended = 0
    for stop in (["aab", "ba"], ["abca", "bc", "cc"], ["abab", "babb"], ["c", "cb"], ["aaaa"]):
        scripted(monkeypatch, LETTERS, *texts)
        got = joined(rack(LETTERS.vocab_size), LETTERS, [""] * len(texts), n=30, stop=stop)
        for text, shown in zip(texts, got):
            read = next((text[:n] for n in range(len(text)) if text[:n].endswith(tuple(stop))), text)
            longest = max((len(s) for s in stop if read.endswith(s)), default=0)
            assert shown == read[: len(read) - longest], (text, stop)
            ended += longest > 0
    assert 100 < ended < 400


class Chunks(ByteTokenizer):
    """Every ``width`` bytes of the poem are a token: characters and stop texts lie across its borders."""

    def __init__(self, width):
        super().__init__()
        data = POEM.encode()
        self.parts = [data[i : i + width] for i in range(0, len(data), width)]
        self.vocab_size = 3 + len(self.parts)

    def encode(self, text):
        assert text in ("", POEM)
        return torch.arange(3, self.vocab_size if text else 3).numpy()

    def decode(self, ids):
        return b"".join(self.parts[i - 3] for i in ids if i >= 3).decode(errors="replace")


def test_nothing_that_may_become_a_stop_text_is_shown_before_it_is_known(monkeypatch):
    scripted(monkeypatch, LETTERS, "abab abac")
    assert pieces(LETTERS, stop=["abac", "e"]) == ["ab", "ab "]


def test_a_stop_text_in_the_prompt_or_across_its_end_does_not_count(monkeypatch):
    scripted(monkeypatch, LETTERS, "b abc")
    assert "".join(pieces(LETTERS, prompt="ab a", stop=["ab"])) == "b "


def watched(monkeypatch):
    """The tokens of each step that the model is asked for, as they come."""
    produced, original = [], text_module.generate

    def generate(*arguments, **settings):
        for chosen in original(*arguments, **settings):
            produced.append(chosen.tolist())
            yield chosen

    monkeypatch.setattr(text_module, "generate", generate)
    return produced


def test_generation_is_not_asked_for_tokens_after_the_stop_text(monkeypatch):
    model = rack(LETTERS.vocab_size)
    (free,) = joined(model, LETTERS, ["a"], n=40, temperature=1.0)
    assert len(free) > 20
    produced = watched(monkeypatch)
    (got,) = joined(model, LETTERS, ["a"], n=40, temperature=1.0, stop=[free[5:8]])
    assert got == free[: free.index(free[5:8])]
    assert len(produced) == len(got) + 3 < 40


def sentencepiece():
    """A tokenizer like Llama's: a word holds the space before it, which decoding drops at the beginning. No padding."""
    words = ["<unk>", "</s>", "▁", "▁the", "▁cat", "▁sat", "s", "▁on", "▁mat"]
    library = Library(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return LibraryTokenizer(library, "pretrained", end="</s>", pad=None, mask=None)


def test_words_that_hold_the_space_before_them_keep_it_after_the_prompt(monkeypatch):
    tokenizer = sentencepiece()
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"
    scripted(monkeypatch, tokenizer, "sat on the mat")
    assert pieces(tokenizer, prompt="the cat") == [" sat", " on", " the", " mat"]
    assert pieces(tokenizer) == ["sat", " on", " the", " mat"]
    assert pieces(tokenizer, prompt="the cat", stop=["n the"]) == [" sat", " o"]


def test_a_tokenizer_without_padding_serves_several_prompts():
    tokenizer = sentencepiece()
    assert tokenizer.pad_id is None
    model = rack(tokenizer.vocab_size)
    prompts = ["the cat", "", "the cat sat on"]
    together = joined(model, tokenizer, prompts, temperature=3.0, seed=[5, 6, 7])
    alone = zip(prompts, (5, 6, 7))
    assert together == [joined(model, tokenizer, [one], temperature=3.0, seed=s)[0] for one, s in alone]
    assert len(set(together)) == 3 and min(map(len, together)) > 20


def test_several_prompts_go_on_as_each_alone_with_the_seed_of_its_row():
    model = rack(LETTERS.vocab_size)
    prompts = ["abc", "", "h", "de fgh\n", ""]
    together = joined(model, LETTERS, prompts, seed=[5, 6, 7, 8, 9], stop=["ab", "c"])
    alone = [joined(model, LETTERS, [one], seed=s, stop=["ab", "c"])[0] for one, s in zip(prompts, (5, 6, 7, 8, 9))]
    assert together == alone
    assert (
        together[1] != together[4]
        and max(map(len, together)) > 3
        and all("c" not in one and "ab" not in one for one in together)
    )


def test_a_text_that_ended_gets_nothing_more_while_others_go_on(monkeypatch):
    scripted(monkeypatch, LETTERS, "ab", "cdefg", "hhhh")
    steps = list(stream_texts(rack(LETTERS.vocab_size), LETTERS, CAUSAL, ["", "a", "bb"], 99, stop=["hh"]))
    assert steps == [["a", "c", ""], ["b", "d", ""], ["", "e", ""], ["", "f", ""], ["", "g", ""], ["", "", ""]]


def test_only_tokens_of_text_and_the_end_of_the_document_are_produced(monkeypatch):
    wide = rack(LETTERS.vocab_size + 30)  # rows of the head that no token has
    produced = watched(monkeypatch)
    texts = joined(wide, LETTERS, [""] * 31, n=50, temperature=50.0)
    assert {token for step in produced for token in step} == {LETTERS.end_id, *range(3, LETTERS.vocab_size)}
    ends = [next((t for t, step in enumerate(produced) if step[row] == LETTERS.end_id), 50) for row in range(31)]
    assert [len(text) for text in texts] == ends and min(ends) < max(ends)


def test_a_prompt_and_tokens_beyond_the_learned_positions_are_refused_at_the_call():
    model = rack(LETTERS.vocab_size, learned=11)
    assert len(joined(model, LETTERS, ["abcd"], n=7, temperature=0)) == 1
    # the token that starts a document is one of the five
    with pytest.raises(UserError, match=r"^8 tokens after a prompt of 5 .* 11 positions .* at most 7 fit$"):
        stream_text(model, LETTERS, CAUSAL, "abcd", 8)
    with pytest.raises(UserError, match=r"at most 7 fit$"):
        stream_texts(model, LETTERS, CAUSAL, ["a", "abcd"], 8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stop": ["a", ""]}, "^stop: "),
        ({"temperature": float("nan")}, "^temperature is nan"),
        ({"min_p": 1.5}, "^min_p"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_the_call(settings, message):
    with pytest.raises(UserError, match=message):
        stream_text(rack(LETTERS.vocab_size), LETTERS, CAUSAL, "a", 5, **settings)


def test_a_masked_model_is_refused():
    masked = {"attention_preset": "bert_style"}, {"progressive": {"training_objective": "mlm"}}
    config = StackWiseConfig.from_dict(dict(zip(("model", "training"), masked)))
    with pytest.raises(UserError, match="generate needs clm"):
        stream_text(rack(LETTERS.vocab_size), LETTERS, config, "a", 5)
