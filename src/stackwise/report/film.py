"""The film of denoising: text that a run of masked diffusion fills in, state by state."""

from __future__ import annotations

from collections.abc import Sequence

from stackwise.generation.filling import GAP, fill_texts, starting_ids
from stackwise.kinds import OBJECTIVES
from stackwise.report.html import Html, element, joined
from stackwise.runs.run import LoadedRun

MOST_FRAMES, SHOWN = 33, 7
"""Frames of a film, and those that stand below each other where it does not play: in print, or without scripts."""


def film_of(run: LoadedRun, n_tokens: int = 48, seed: int = 0) -> list[str]:
    """The states of ``n_tokens`` tokens as they are filled in from nothing, ``GAP`` for what is missing.

    None where the run fills no gaps. Of many states, every so many are kept, the first and the last among them.
    """
    if OBJECTIVES[run.config.training.objective].sampler != "filling":
        return []
    n_tokens = min(n_tokens, run.config.training.seq_len)
    start = starting_ids(run.tokenizer, "", n_tokens, None)
    states = [GAP * n_tokens]
    for (text,) in fill_texts(run.rack, run.tokenizer, run.config, [start], seed=seed):
        if text != states[-1]:
            states.append(text)
    return chosen(states, MOST_FRAMES)


def chosen(states: Sequence[str], most: int) -> list[str]:
    """At most ``most`` of the states, evenly spread, the first and the last among them."""
    if len(states) <= most:
        return list(states)
    return [states[round(i * (len(states) - 1) / (most - 1))] for i in range(most)]


def film(frames: Sequence[str]) -> Html:
    """The frames below each other, and in their place a player where scripts run."""
    if not frames:
        return Html("")
    still = chosen(frames, SHOWN)
    rows = []
    for i, frame in enumerate(still):
        rows += [element("span", f"{i / max(len(still) - 1, 1):.0%}"), element("div", _state(frame), class_="text")]
    hidden = [element("div", _state(frame), class_="text", hidden=True) for frame in frames]
    slider = '<input type="range" min="0" max="{}" value="0" aria-label="how far the text is filled in">'
    player = element("div", Html(slider.format(len(frames) - 1)), element("pre", *hidden), class_="player")
    return element("div", player, element("div", *rows, class_="frames"), class_="film")


def _state(text: str) -> Html:
    parts, gap = [], False
    run = ""
    for letter in (*text, None):
        if letter is not None and (letter == GAP) == gap:
            run += letter
            continue
        parts.append(element("span", run, class_="gap") if gap else run)
        run, gap = letter or "", letter == GAP
    return joined(parts)


SCRIPT = Html(
    "<script>for(const film of document.querySelectorAll('.film')){const frames=film.querySelectorAll('pre>div'),"
    "at=film.querySelector('input'),show=()=>frames.forEach((f,i)=>f.hidden=i!=at.value);"
    "film.querySelector('.player').style.display='block';film.querySelector('.frames').classList.add('printed');"
    "at.oninput=()=>{clearInterval(timer);show()};show();"
    "const timer=setInterval(()=>{at.value=+at.value+1;show();if(at.value==frames.length-1)clearInterval(timer)},180)}"
    "</script>"
)
"""Plays every film of the page once; its slider then moves through it."""
