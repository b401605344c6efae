"""Checkpoints as a content-addressed store: safetensors objects named by their hash, and JSON manifests.

``FOLDER/objects/<sha256>.safetensors`` holds the tensors of one part (a Stack, the embedding, the optimizer…);
``FOLDER/step-<step>.json`` names the objects of one checkpoint and is renamed into place last, so that a checkpoint is
there whole or not at all; ``FOLDER/newest`` then holds its step, by which a lost manifest is noticed. A part that did
not change is written once, whatever the number of checkpoints that hold it.
Every load compares the bytes it returns with the object's name. No pickle.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from stackwise.errors import RunError
from stackwise.files import FULL, reason, remove_leftovers, sync_directory, write_atomic
from stackwise.reading import parse_json
from stackwise.signals import stop_if_asked
from stackwise.store.manifest import Manifest, UnknownFormat, bytes_of_manifest, read_manifest
from stackwise.store.objects import StoredObject, hash_file, hash_part, header_of, read_safetensors, serialise
from stackwise.units import size

_MANIFEST_NAME = re.compile(r"step-(\d{8,})\.json")
_OBJECT_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class CheckpointError(RunError):
    """A checkpoint cannot be written, or is missing or damaged; the message says which and what still works."""


@dataclass(frozen=True)
class Checkpoint:
    """One saved step. ``parts[name]`` (or ``part(name)``) reads that part's tensors and checks them, each time anew."""

    step: int
    state: dict[str, Any]
    parts: Mapping[str, dict[str, Tensor]]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, on the device given to ``load``; nothing else is read."""
        return self.parts[name]


class CheckpointStore:
    """The checkpoints in ``folder`` (``RUN/checkpoints``).

    Kept are those that were saved to be kept (``keep``), the newest ``keep_last`` of the others, and the steps that any
    of them needs.

    One process at a time may save (``RunDir.lock`` sees to it); any number may load. Nothing is made or deleted
    before the first ``save``.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least one checkpoint must be kept")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self._objects = self.folder / "objects"
        self._newest = self.folder / "newest"
        self._verified: set[str] = set()  # hashes of objects this process has written or read whole
        self._latest: dict[str, StoredObject] = {}  # the parts of the checkpoint last saved or loaded here
        self._deposits: dict[str, StoredObject] = {}  # parts that are in the store and not in memory

    def steps(self) -> list[int]:
        """Steps of the checkpoints whose manifest is sound and whose objects are there, ascending.

        The objects' bytes are not read; loading does that.
        """
        return [manifest.step for manifest in self._complete()]

    def has_any(self) -> bool:
        """Whether a checkpoint was ever saved here: a damaged or lost one counts, and is ``load``'s error to raise."""
        return bool(self._manifest_steps()) or self._newest_step() is not None

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        state: dict[str, Any],
        *,
        unchanged: Collection[str] = (),
        deposited: Collection[str] = (),
        keep: bool = False,
        needs: Collection[int] = (),
    ) -> Path:
        """Writes the checkpoint of ``step`` and returns its manifest, then deletes what is no longer kept.

        ``unchanged`` names parts that are bit-identical to those of the checkpoint that this store last saved or
        loaded (frozen Stacks): they are not hashed again, provided that this process wrote or read their object.
        ``deposited`` names parts that are in the store already (``deposit``, ``adopt``) and not among ``parts``.
        ``keep``: it is never deleted for its age; ``needs``: steps whose checkpoints stay as long as this one does.
        ``state`` is JSON with finite numbers and comes back equal. Checkpoints of later steps are deleted: they belong
        to a course of training that this one, resumed before them, has left.

        CheckpointError when it cannot be written; the checkpoints before it are then as they were.
        """
        assert set(unchanged) <= set(parts), f"unchanged parts that are not given: {set(unchanged) - set(parts)}"
        text = json.dumps(state, allow_nan=False)
        if parse_json(text) != state:
            raise ValueError("the state of a checkpoint must come back from JSON as it was: no tuples, no integer keys")
        entries: dict[str, StoredObject] = {name: self._deposits[name] for name in deposited}
        missing, needed_bytes = dict[str, str](), 0  # hash -> a part with that content
        try:
            for name, tensors in parts.items():
                known = self._reusable(name, tensors) if name in unchanged else None
                entry = entries[name] = known or hash_part(name, tensors)
                if entry.sha256 not in missing and not self._holds(entry):
                    missing[entry.sha256] = name
                    needed_bytes += entry.bytes
            manifest = Manifest(step, entries, state, keep, tuple(needs))
            manifest_bytes = bytes_of_manifest(manifest)
            needed_bytes += len(manifest_bytes)
            self._make_folders()
            for sha256, name in missing.items():
                write_atomic(self._object_path(sha256), serialise(name, parts[name]))
                self._verified.add(sha256)
            sync_directory(self._objects)
            path = self._manifest_path(step)
            write_atomic(path, [manifest_bytes])
            sync_directory(self.folder)
            self._set_newest(step)
        except OSError as error:
            with contextlib.suppress(OSError):  # the error to report is the first one
                self._delete_unnamed()
            self._raise_unwritten(step, error, needed_bytes)
        self._latest = manifest.parts
        try:
            self._retain(step)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} is saved, but an older one cannot be deleted from {self.folder}: "
                f"{error.strerror or error}"
            ) from error
        return path

    def load(self, step: int | None = None, device: str | torch.device = "cpu") -> Checkpoint:
        """The checkpoint of ``step``, or the newest. Its parts are read, and checked, when they are asked for.

        CheckpointError when there is none, or its manifest is damaged, or an object is missing or of the wrong size;
        and when no ``step`` is asked for and the newest checkpoint's manifest is lost.
        """
        steps, newest = self._manifest_steps(), self._newest_step()
        if not steps:
            lost = "" if newest is None else f", though one of step {newest} was saved there: its manifest is lost"
            raise CheckpointError(f"{self.folder} holds no checkpoint{lost}")
        if step is None:
            step = steps[-1]
            if newest is not None and newest > step:
                lost_manifest = CheckpointError(
                    f"the checkpoint of step {newest}, the newest, is lost: {self._manifest_path(newest)} is missing"
                )
                raise self._with_advice(lost_manifest, newest)
        elif step not in steps:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint of step {step}; there are steps {', '.join(map(str, steps))}"
            )
        try:
            manifest = self._read_manifest(step)
            for name, entry in manifest.parts.items():
                self._check_size(step, name, entry)
        except CheckpointError as error:
            raise self._with_advice(error, step) from error
        self._latest = manifest.parts
        return Checkpoint(step, manifest.state, _Parts(self, manifest, torch.device(device)))

    def deposit(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a part that then need not stay in memory: ``withdraw`` reads it, and ``save`` takes its name.

        CheckpointError when it cannot be written.
        """
        entry = hash_part(name, tensors)
        try:
            self._make_folders()
            if not self._holds(entry):
                write_atomic(self._object_path(entry.sha256), serialise(name, tensors))
                self._verified.add(entry.sha256)
                sync_directory(self._objects)
        except OSError as error:
            raise CheckpointError(f"{self._objects}: cannot be written: {reason(error)}") from error
        self._deposits[name] = entry

    def adopt(self, checkpoint: Checkpoint, name: str) -> None:
        """Makes a part of a loaded checkpoint a deposit, without reading it."""
        assert isinstance(checkpoint.parts, _Parts)
        self._deposits[name] = checkpoint.parts.entry(name)

    def verify(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        """Compares parts of a loaded checkpoint that need not be read now with their hashes.

        CheckpointError when one is damaged.
        """
        assert isinstance(checkpoint.parts, _Parts)
        for name in names:
            entry = checkpoint.parts.entry(name)
            if not self._holds(entry):
                path, problem = self._object_path(entry.sha256), "its content does not match its sha256"
                try:
                    self._raise_damaged(checkpoint.step, name, path, problem)
                except CheckpointError as error:
                    raise self._with_advice(error, checkpoint.step) from error

    def withdraw(self, name: str) -> dict[str, Tensor]:
        """The tensors of a deposit, from its file; hashed when this process reads it for the first time.

        CheckpointError when it is missing or damaged.
        """
        entry = self._deposits[name]
        path = self._object_path(entry.sha256)
        try:
            tensors = read_safetensors(path, entry, check=entry.sha256 not in self._verified)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the weights of {name} cannot be read: {path}: {error}") from error
        self._verified.add(entry.sha256)
        return tensors

    def hash_of(self, name: str) -> str:
        """The sha256 of a deposit's file."""
        return self._deposits[name].sha256

    def copy(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Writes a checkpoint, and those that it needs, into ``folder``, as the only ones there.

        Raises:
            CheckpointError: an object of it is damaged. OSError: it cannot be written.
        """
        manifest = self._read_manifest(checkpoint.step)
        others = [self._read_manifest(step) for step in manifest.needs if step in self._manifest_steps()]
        target = CheckpointStore(folder)
        target._make_folders()
        for one in (*others, manifest):
            self.verify(Checkpoint(one.step, one.state, _Parts(self, one, torch.device("cpu"))), one.parts)
            for entry in one.parts.values():
                shutil.copyfile(self._object_path(entry.sha256), target._object_path(entry.sha256))
            write_atomic(target._manifest_path(one.step), [bytes_of_manifest(one)])
        target._set_newest(manifest.step)

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, and what a killed process left: the run goes on from ``step``.

        CheckpointError when it cannot.
        """
        try:
            if any(other > step for other in (*self._manifest_steps(), self._newest_step() or 0)):
                self._set_newest(step)  # first: what is deleted on purpose is not lost
            self._retain(step)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoints after step {step} cannot be deleted from {self.folder}: {error.strerror or error}"
            ) from error

    def _read_part(self, manifest: Manifest, name: str, device: torch.device) -> dict[str, Tensor]:
        stop_if_asked()
        try:
            return self._read_object(manifest.step, name, manifest.parts[name], device)
        except CheckpointError as error:
            raise self._with_advice(error, manifest.step) from error

    # Files and their names.

    def _manifest_path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.json"

    def _newest_step(self) -> int | None:
        """The step of the checkpoint saved last, as it was noted then. CheckpointError when the note is damaged."""
        try:
            with open(self._newest, encoding="ascii", errors="replace") as file:
                text = file.read(32)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self._newest}: cannot be read: {error.strerror or error}") from error
        if not re.fullmatch(r"\d{1,18}\n?", text, re.ASCII):
            raise CheckpointError(f"{self._newest}: it holds {text[:20]!r} and no step; delete it to do without it")
        return int(text)

    def _set_newest(self, step: int) -> None:
        write_atomic(self._newest, [f"{step}\n".encode()])
        sync_directory(self.folder)

    def _object_path(self, sha256: str) -> Path:
        return self._objects / f"{sha256}.safetensors"

    def _manifest_steps(self) -> list[int]:
        """Steps that have a manifest, sound or not, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_MANIFEST_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _make_folders(self) -> None:
        if not self._objects.is_dir():
            self._objects.mkdir(parents=True, exist_ok=True)
            sync_directory(self.folder)
            sync_directory(self.folder.parent)

    # Reading.

    def _read_manifest(self, step: int) -> Manifest:
        path = self._manifest_path(step)
        try:
            return read_manifest(path, step)
        except OSError as error:
            problem = error.strerror or str(error)
        except UnknownFormat as error:
            raise CheckpointError(str(error)) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"the manifest is damaged ({error})"
        raise CheckpointError(f"the checkpoint of step {step} cannot be read: {path}: {problem}")

    def _check_size(self, step: int, name: str, entry: StoredObject) -> None:
        path = self._object_path(entry.sha256)
        try:
            size = path.stat().st_size
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            self._raise_damaged(step, name, path, "the file is missing" if missing else error.strerror or str(error))
        if size != entry.bytes:
            self._raise_damaged(step, name, path, f"the file has {size} bytes instead of {entry.bytes}")

    def _read_object(self, step: int, name: str, entry: StoredObject, device: torch.device) -> dict[str, Tensor]:
        self._check_size(step, name, entry)
        path = self._object_path(entry.sha256)
        try:
            tensors = read_safetensors(path, entry)
        except OSError as error:
            self._raise_damaged(step, name, path, error.strerror or str(error))
        except ValueError as error:
            self._raise_damaged(step, name, path, str(error))
        self._verified.add(entry.sha256)
        return {key: tensor.to(device) for key, tensor in tensors.items()}

    @staticmethod
    def _raise_damaged(step: int, name: str, path: Path, problem: str) -> NoReturn:
        raise CheckpointError(f"the checkpoint of step {step} is damaged in part {name!r}: {path}: {problem}")

    def _complete(self) -> list[Manifest]:
        """Manifests that are sound and whose objects are there with the right size, ascending."""
        complete = []
        for step in self._manifest_steps():
            with contextlib.suppress(CheckpointError):  # incomplete is the answer here; load says what is wrong
                manifest = self._read_manifest(step)
                for name, entry in manifest.parts.items():
                    self._check_size(step, name, entry)
                complete.append(manifest)
        return complete

    def _is_intact(self, manifest: Manifest) -> bool:
        """Reads every byte of a checkpoint."""
        return all(hash_file(self._object_path(entry.sha256)) == entry.sha256 for entry in manifest.parts.values())

    def _intact_step(self, besides: int) -> int | None:
        """The newest checkpoint before ``besides`` that can be loaded, else the first one after it."""
        others = [manifest for manifest in self._complete() if manifest.step != besides]
        others.sort(key=lambda manifest: (manifest.step > besides, abs(manifest.step - besides)))
        return next((manifest.step for manifest in others if self._is_intact(manifest)), None)

    def _with_advice(self, error: CheckpointError, step: int) -> CheckpointError:
        intact = self._intact_step(besides=step)
        if intact is None:
            return CheckpointError(f"{error}; no other checkpoint is intact")
        command = f"stackwise resume {self.folder.parent} --step {intact}"
        return CheckpointError(f"{error}; the checkpoint of step {intact} is intact: {command}")

    # Writing.

    def _reusable(self, name: str, tensors: Mapping[str, Tensor]) -> StoredObject | None:
        """The object of an unchanged part, where this process knows it to be good and its size fits."""
        entry = self._latest.get(name)
        if entry is None or entry.sha256 not in self._verified or not self._holds(entry):
            return None
        header, data_bytes = header_of(name, tensors)
        return entry if entry.bytes == len(header) + data_bytes else None

    def _holds(self, entry: StoredObject) -> bool:
        """Whether the object is in the store and good; one this process has not seen whole is read for that."""
        path = self._object_path(entry.sha256)
        if not path.is_file() or path.stat().st_size != entry.bytes:
            return False
        if entry.sha256 not in self._verified:
            if hash_file(path) != entry.sha256:
                return False
            self._verified.add(entry.sha256)
        return True

    def _retain(self, step: int) -> None:
        """Deletes manifests after ``step``, damaged ones and those that are not kept; then objects without a name."""
        sound = [manifest for manifest in self._complete() if manifest.step <= step]
        staying = [manifest for manifest in sound if manifest.keep]
        staying += [manifest for manifest in sound if not manifest.keep][-self.keep_last :]
        wanted = {other for manifest in staying for other in (manifest.step, *manifest.needs)}
        kept = wanted & {manifest.step for manifest in sound}
        dropped = [other for other in self._manifest_steps() if other not in kept]
        for other in dropped:
            self._manifest_path(other).unlink(missing_ok=True)
        if dropped:
            sync_directory(
                self.folder
            )  # before the objects go, or a power cut could bring a manifest back without them
        self._delete_unnamed()

    def _delete_unnamed(self) -> None:
        """Deletes the objects that no manifest names and the files that a killed process left half written.

        Nothing but half-written files goes while a manifest cannot be read, since what it names is then unknown.
        """
        remove_leftovers(self.folder, rf"{_MANIFEST_NAME.pattern}|newest")
        remove_leftovers(self._objects, _OBJECT_NAME.pattern)
        try:
            manifests = [self._read_manifest(step) for step in self._manifest_steps()]
        except CheckpointError:
            return
        named = {entry.sha256 for manifest in manifests for entry in manifest.parts.values()}
        named |= {entry.sha256 for entry in self._deposits.values()}
        for path in self._objects.iterdir() if self._objects.is_dir() else ():
            if _OBJECT_NAME.fullmatch(path.name) and path.stem not in named:
                path.unlink(missing_ok=True)
                self._verified.discard(path.stem)

    def _raise_unwritten(self, step: int, error: OSError, needed_bytes: int) -> NoReturn:
        if error.errno in FULL:
            problem = f"{reason(error)}: the checkpoint of step {step} needs {size(needed_bytes)} more"
            problem += f" in {self.folder}"
        else:
            problem = f"the checkpoint of step {step} cannot be written in {self.folder}: {reason(error)}"
        intact = self._intact_step(besides=step)
        rest = "no other checkpoint is intact" if intact is None else f"the checkpoint of step {intact} is intact"
        raise CheckpointError(f"{problem}; {rest}") from error


class _Parts(Mapping[str, dict[str, Tensor]]):
    """The parts of a checkpoint, read when indexed."""

    def __init__(self, store: CheckpointStore, manifest: Manifest, device: torch.device) -> None:
        self._store, self._manifest, self._device = store, manifest, device

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if name not in self._manifest.parts:
            raise KeyError(name)
        return self._store._read_part(self._manifest, name, self._device)

    def entry(self, name: str) -> StoredObject:
        return self._manifest.parts[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the part
        return name in self._manifest.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.parts)

    def __len__(self) -> int:
        return len(self._manifest.parts)
