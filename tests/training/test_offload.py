"""Stacks that wait elsewhere: how many are in memory at once, who reads them, and that nothing else differs."""

import gc
import threading
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from stackwise.growth.adapters import add_adapter
from stackwise.growth.phases import Adapter
from stackwise.growth.precision import PrecisionManager
from stackwise.growth.preparation import set_trainable
from stackwise.model.architecture import create_simple_rack
from stackwise.model.reading import Reading
from stackwise.training.offload import Offload, all_tensors

V, N = 37, 6
IDS = torch.arange(33).view(3, 11) % V
LORA = [Adapter(k, "stack", 2, 3.0) for k in range(2, N)]


def rack(precision="full"):
    model = create_simple_rack(N, 1, 26, 19, 13, V)
    for stack in list(model.stacks)[1:]:
        PrecisionManager().store(stack, precision)
    for adapter in LORA:
        add_adapter(model.stacks[adapter.stack], adapter, 0)
        with torch.no_grad():
            for name, p in model.stacks[adapter.stack].named_parameters():
                if name.endswith(".B"):
                    p.fill_(0.1)
    set_trainable(model, ["embedding", "stack.0"], LORA)
    return model


class Sources:
    """Where the Stacks wait. Knows which of the copies that were taken still live, and which thread took them."""

    def __init__(self, model, offload, stacks):
        self.live, self.most, self.threads, self.calls, self.broken = {}, 0, [], [], None
        for k in stacks:
            kept = {name: tensor.clone() for name, tensor in model.stacks[k].own_tensors().items()}
            offload.send(model.stacks[k], lambda k=k, kept=kept: self.taken(k, kept))

    def taken(self, k, kept):
        if k == self.broken:
            raise OSError(f"no Stack {k}")
        copies, number = {name: tensor.clone() for name, tensor in kept.items()}, len(self.threads)
        self.threads.append(threading.current_thread().name.partition("_")[0])
        self.calls.append(k)
        self.live[number] = len(copies)
        for tensor in copies.values():
            weakref.finalize(tensor.untyped_storage(), self.let_go, number)
        self.most = max(self.most, len(self.live))
        return copies

    def let_go(self, number):
        self.live[number] -= 1
        if not self.live[number]:
            del self.live[number]


def step(model):
    out = model(IDS)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.detach(), gradients


@pytest.mark.parametrize("precision", ["full", "int8", "nf4"])
def test_two_stacks_at_most_are_in_memory_and_gradients_are_bit_identical(precision):
    model, resident, offload = rack(precision), rack(precision), Offload(torch.device("cpu"))
    sources = Sources(model, offload, range(1, N))
    assert offload.offloaded == set(range(1, N))
    assert all(t.is_meta for k in range(1, N) for t in model.stacks[k].own_tensors().values())
    wanted, gradients = step(resident)
    gc.disable()  # what is let go is let go at once, not when cycles are collected
    try:
        for _ in range(3):
            out, found = step(model)
            assert torch.equal(out, wanted) and found.keys() == gradients.keys()
            assert all(torch.equal(found[name], gradients[name]) for name in found)
        assert sources.most == 2
        offload.close()
        assert not sources.live
    finally:
        gc.enable()


def test_from_the_second_step_on_a_thread_has_read_every_stack_before_it_is_asked_for():
    model, offload = rack(), Offload(torch.device("cpu"))
    sources = Sources(model, offload, range(1, N))
    step(model)
    order = [*range(1, N), *reversed(range(1, N))]
    first = len(sources.calls)
    assert sources.calls[: 2 * (N - 1)] == order
    step(model)
    step(model)
    offload.close()
    # The two pairs that a new step begins with were not seen in the first one.
    assert sources.threads[first + 2 :] == ["offload"] * len(sources.threads[first + 2 :])
    assert sources.calls[first : first + 4 * (N - 1)] == order * 2


def test_another_order_is_read_rightly_too():
    model, resident, offload = rack("nf4"), rack("nf4"), Offload(torch.device("cpu"))
    Sources(model, offload, range(1, N))
    for _ in range(2):
        step(model)
        with torch.no_grad():  # a validation between two steps: forward passes only
            for _ in range(2):
                assert torch.equal(model(IDS), resident(IDS))
    assert torch.equal(step(model)[0], step(resident)[0])
    offload.close()
    assert torch.equal(model(IDS), resident(IDS))  # closed, it can be fetched again
    offload.close()


def test_a_stack_that_is_brought_back_is_what_it_was():
    model, resident, offload = rack("nvfp4"), rack("nvfp4"), Offload(torch.device("cpu"))
    sources = Sources(model, offload, (2, 4))
    there = {f"{part}/{name}": tensor for part, name, tensor in resident.part_tensors()}
    found = {f"{part}/{name}": tensor for part, name, tensor in all_tensors(model, offload)}
    assert found.keys() == there.keys() and all(torch.equal(found[name], there[name]) for name in there)
    with offload.holding(model.stacks[2]):
        assert offload.offloaded == {4} and model.stacks[2].fetch is None
        assert not any(t.is_meta for t in model.stacks[2].state_dict().values())
        calls = len(sources.calls)
        model(Reading(boundary=torch.randn(1, 5, 26), start=2, stop=3, finished=False))
        assert len(sources.calls) == calls
    assert offload.offloaded == {2, 4}
    for k in (2, 4):
        offload.bring(model.stacks[k])
    offload.bring(model.stacks[4])  # at home already
    assert not offload.offloaded
    for part, name, tensor in model.part_tensors():
        assert torch.equal(tensor, there[f"{part}/{name}"]), (part, name)
    assert not any(p.requires_grad for n, p in model.stacks[2].named_parameters() if ".adapters." not in n)


def test_an_error_while_reading_ahead_reaches_the_step_that_needs_it_and_is_told_once():
    model, offload = rack(), Offload(torch.device("cpu"))
    sources = Sources(model, offload, range(1, N))
    step(model)
    step(model)
    sources.broken = 3
    with pytest.raises(OSError, match="no Stack 3"):
        step(model)
    sources.broken = None
    model.zero_grad(set_to_none=True)
    assert torch.equal(step(model)[0], step(rack())[0])
    offload.close()


class Recorder:
    """Stands for the streams of a GPU, and writes down what is asked of them."""

    def __init__(self):
        self.calls = []

    def stream(self, device):
        recorder = self

        class Stream:
            def record_event(self):
                recorder.calls.append("copied")
                return "event"

        return Stream()

    @contextmanager
    def using(self, stream):
        self.calls.append("begin")
        yield
        self.calls.append("end")

    def current(self, device):
        return SimpleNamespace(wait_event=lambda event: self.calls.append(f"wait for {event}"))


def test_on_cuda_a_copy_has_a_stream_of_its_own_that_computing_waits_for(monkeypatch):
    """Tensors that stand for those of the host: page-locked first, then copied without waiting, then used."""
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "Stream", recorder.stream)
    monkeypatch.setattr(torch.cuda, "stream", recorder.using)
    monkeypatch.setattr(torch.cuda, "current_stream", recorder.current)

    class OnDevice:
        def record_stream(self, stream):
            recorder.calls.append("in use")

    class Locked:
        def to(self, device, non_blocking):
            recorder.calls.append(f"copy to {device.type}, waiting: {not non_blocking}")
            return OnDevice()

    class OnHost:
        def pin_memory(self):
            recorder.calls.append("lock")
            return Locked()

    offload = Offload(torch.device("cuda"))
    brought = offload._brought(lambda: {"weight": OnHost()})
    assert recorder.calls == ["begin", "lock", "copy to cuda, waiting: False", "copied", "end"]
    recorder.calls.clear()
    assert set(offload._ready(brought)) == {"weight"}
    assert recorder.calls == ["wait for event", "in use"]
