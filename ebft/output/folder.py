"""The folder that a run writes: what is finished is committed at once, and survives whatever ends the run.

Everything goes to ``OUT.partial``, which in the end becomes ``OUT``. A part of the run (the dense perplexity, a block,
the saved model …) is committed by a small record, written last and atomically, that names the part's files and their
checksums. A record that is not whole, or whose files are not, counts as absent, and so does all that came after it.

Long, because the order of writes, syncs and renames is one argument, which has to be read as a whole.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ebft.errors import EBFTError, first_line
from ebft.files import checksum, read_json
from ebft.model.libraries import quiet
from ebft.model.tensors import Tensors
from ebft.output.records import (
    COMMITS,
    SUMMARY,
    TEMPORARY,
    WORKING,
    digest_of,
    finite,
    sealed,
    sync,
    unsealed,
    write_whole,
)
from ebft_kernels import PackedMask, load_masks, save_masks

MASKS = "masks.safetensors"
_BLOCKS, _STREAMS, _TEXT = "blocks", "streams", "text"  # what only the run itself needs, beside COMMITS
_REPLACED = ".replaced"  # an earlier run's output, for the moment that the new one takes its place
_OWN = (_STREAMS, _BLOCKS, COMMITS, _TEXT, _REPLACED, WORKING)  # in the order that they are removed in


def check_settings_save(called: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """``EBFTError`` if what ``save_settings`` writes cannot be saved, by saving it elsewhere: libraries check it then.

    Args:
        called: the model, in a sentence.
    """
    # No room for temporary files is no fault of the model's.
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix="ebft-") as folder, _by_libraries(called):
        _write_settings(model, tokenizer, Path(folder))


def _write_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


@contextlib.contextmanager
def _by_libraries(called: str) -> Iterator[None]:
    """Around what transformers and tokenizers save: an ``OSError``, or one sentence for whatever else they raise."""
    try:
        with quiet():
            yield
    except (OSError, SafetensorError, EBFTError):
        raise
    except Exception as error:
        if type(error) is Exception:  # how tokenizers says what the file system refused
            raise OSError(first_line(error)) from error
        raise EBFTError(f"{called} cannot be saved as it is: {first_line(error.__cause__ or error)}") from error


class OutputFolder:
    """The folder that a run or ``ebft.compress`` writes.

    Making one decides whether ``OUT`` can be had; a link is followed, and what it leads to is made. Entering it begins,
    in place of what an earlier run left in ``OUT.partial``, or with ``resume`` goes on with that. A run that fails
    leaves ``OUT.partial`` if it had committed a part. Only ``commit`` touches ``OUT``, and never where it holds a file
    that no run made.

    Attributes:
        fingerprint: what the run depends on, by heading and name; an interrupted one is gone on with only if all of it
            is the same.
        about: what is to be said of the run before it has ended.
        resumed: whether there was an interrupted run to go on with; known once entered.
        notes: what was found broken, in sentences.
        newest: the recovery of the whole model that ``block`` reads what it has left; none: the walk.

    Raises:
        EBFTError: ``OUT`` cannot be written, is there already and ``overwrite`` is not set, or is no run's output; or
            an interrupted run was begun with something else.
    """

    def __init__(self, path: str, *, overwrite: bool, made_by: str = SUMMARY, resume: bool = False) -> None:
        self.final, self.path = _followed(path), self.partial(path)
        self.fingerprint: dict[str, dict[str, Any]] = {}
        self.about: dict[str, Any] = {}
        self.resumed = False
        self.notes: list[str] = []
        self.newest = ""
        self._resume, self._made_by = resume, made_by
        self._accepted: set[str] = set()
        self._opened = contextlib.ExitStack()
        self._check_place(path)
        with self.writing():
            if (self.path / _REPLACED).is_dir() and not self.final.exists():  # a commit that was cut short: undo it
                (self.path / _REPLACED).rename(self.final)
            if (self.final / WORKING).is_file() and (self.final / made_by).is_file():  # or finish it
                self._tidy()
            if self.final.exists():
                ours = self.final.is_dir() and (self.final / made_by).is_file()
                if not ours and (not self.final.is_dir() or any(self.final.iterdir())):
                    raise EBFTError(
                        f"--output {path} is there and holds no {made_by}, so no run made it; choose another folder"
                    )
                if ours and not overwrite and not self.finished:
                    raise EBFTError(f"--output {path} holds an earlier run; give --overwrite to replace it")
                if ours and not self.finished:
                    self._check_strangers()
            strange = self.path.exists() and not (self.path / WORKING).is_file()
            if self.path.is_symlink() or (strange and {entry.name for entry in self.path.iterdir()} - _NEW):
                raise EBFTError(f"{self.path} is in the way and no run made it; choose another --output")

    @staticmethod
    def partial(path: str) -> Path:
        """Where a run works whose output is ``path``."""
        final = _followed(path)
        return final.with_name(final.name + ".partial")

    @property
    def finished(self) -> bool:
        """There is nothing to resume because ``OUT`` is done."""
        return self._resume and (self.final / self._made_by).is_file() and not (self.path / WORKING).is_file()

    def __enter__(self) -> OutputFolder:
        with self.writing(), contextlib.ExitStack() as opened:
            self._check_strangers()
            if (self.path / WORKING).is_file():
                self._keep_others_out(opened)
            if self._resume and (self.path / WORKING).is_file():
                self._check_fingerprint()
                self.resumed = True
            else:
                self._begin()
                self._keep_others_out(opened)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._opened.close()
        if kind is not None and self.path.exists() and not self.kept():
            shutil.rmtree(self.path)

    def kept(self) -> bool:
        """Whether a part of the run has been committed."""
        return is_kept(self.path)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Say what the file system refused in one sentence."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            kept = f"; what was finished is kept in {self.path}: --resume goes on from there" if self.kept() else ""
            raise EBFTError(f"--output {self.final} cannot be written: {reason}{kept}") from None

    # --- parts that are finished -------------------------------------------------------------------------------

    def commit_part(self, name: str, content: dict[str, Any], files: Iterable[Path] = ()) -> None:
        """Keep what a part of the run came to; ``files`` (in this folder) are all written, and belong to it."""
        with self.writing():
            record = {"run": digest_of(self.fingerprint), "content": content, "files": self.checksums(files)}
            write_whole(self.path / COMMITS / f"{name}.json", sealed(record))
        self._accepted.add(name)

    def part(self, name: str, *, alone: bool = False) -> dict[str, Any] | None:
        """What ``commit_part`` kept, if it, all of its files and all parts asked for before are whole; or None.

        ``alone``: no part depends on this one until ``forget_others`` is called.
        """
        if not self.resumed:
            return None
        with self.writing():
            record, file = None, self.path / COMMITS / f"{name}.json"
            if file.is_file():
                record = unsealed(file)
                broken = None if record else file
                if record and record["run"] != digest_of(self.fingerprint):
                    record, broken = None, file
                if record:
                    known = record["files"].items()
                    broken = next((self.path / name for name, sum in known if not self._is(name, sum)), None)
                if broken:
                    self.notes.append(f"{broken} is broken: the run goes on from before it")
                    record = None
            if record is None:
                if not alone:
                    self.forget_others()
                return None
        self._accepted.add(name)
        return record["content"]

    def drop_part(self, name: str, files: Iterable[Path]) -> None:
        """A part that nothing needs any more, and its files."""
        self._accepted.discard(name)
        for file in (self.path / COMMITS / f"{name}.json", *files):
            file.unlink(missing_ok=True)

    def forget_others(self) -> None:
        """Nothing counts that came after the parts that were asked for."""
        self.resumed = False
        with self.writing():
            for later in (self.path / COMMITS).glob("*.json"):
                if later.stem not in self._accepted:
                    later.unlink()

    def checksums(self, files: Iterable[Path]) -> dict[str, str]:
        """Name in this folder -> checksum, of files that are then sure to be on the disk."""
        sums = {}
        for file in files:
            sync(file)
            sums[str(file.relative_to(self.path))] = checksum(file)
        for folder in {file.parent for file in map(self.path.joinpath, sums)}:
            sync(folder)
        return sums

    def are_whole(self, sums: Mapping[str, str]) -> bool:
        """Whether files are what ``checksums`` saw."""
        return all(self._is(name, known) for name, known in sums.items())

    def _is(self, name: str, known: str) -> bool:
        return (self.path / name).is_file() and checksum(self.path / name) == known

    def checkpoint_file(self, part: str, number: int) -> Path:
        """Where the state of an unfinished part of the run is kept (``Checkpoint``)."""
        return self.path / _BLOCKS / f"{part}.{number}.safetensors"

    # --- text that the dense model has written ------------------------------------------------------------------

    def write_generated(self, ids: Tensor, made_from: str) -> list[Path]:
        """Keep token ids, int64, and a digest of what they depend on; gives the file."""
        file = self.path / _TEXT / "generated.safetensors"
        with self.writing():
            file.parent.mkdir(exist_ok=True)
            save_file({"ids": ids}, file, metadata={"made_from": made_from, "sha256": digest_of(ids.tolist())})
        return [file]

    def generated(self, made_from: str) -> Tensor | None:
        """The token ids that an interrupted run kept, if it is to be resumed and they are whole and depend on these."""
        file = self.path / _TEXT / "generated.safetensors"
        if not self._resume or not file.is_file():
            return None
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="pt") as opened:
            ids, about = opened.get_tensor("ids"), opened.metadata()
            if about == {"made_from": made_from, "sha256": digest_of(ids.tolist())}:
                return ids
        return None

    # --- what is written ----------------------------------------------------------------------------------------

    @property
    def streams(self) -> Path:
        """The folder for streams that are kept on disk."""
        return self.path / _STREAMS

    def write_block(
        self,
        index: int,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, PackedMask],
        pruned: Mapping[str, Tensor] | None = None,
    ) -> list[Path]:
        """Write the finished weights (under the checkpoint's names) and masks of one block; gives the files.

        Args:
            pruned: its weights before recovery, where these are not the dense ones with zeros.
        """
        files = {self._block_file(index): weights}
        if pruned is not None:
            files[self._pruned_file(index)] = pruned
        with self.writing():
            for file, of_file in files.items():
                save_file({name: weight.contiguous() for name, weight in of_file.items()}, file)
            save_masks(masks, self._mask_file(index))
        return [*files, self._mask_file(index)]

    def rewrite_block(self, index: int, weights: Mapping[str, Tensor], by: str) -> Path:
        """Write what the recovery ``by`` has made of a finished block, whose file stays; gives the file."""
        with self.writing():
            save_file({name: weight.contiguous() for name, weight in weights.items()}, self._block_file(index, by))
        return self._block_file(index, by)

    def block(self, index: int) -> Tensors:
        """The weights of a block as they are now: ``write_block``'s, or ``rewrite_block``'s by ``newest``."""
        return Tensors([self._block_file(index, self.newest)])

    def pruned_block(self, index: int) -> Tensors | None:
        """The weights before recovery that ``write_block`` wrote; None where they are the dense ones with zeros."""
        file = self._pruned_file(index)
        return Tensors([file]) if file.is_file() else None

    def block_masks(self, index: int) -> dict[str, PackedMask]:
        """The masks that ``write_block`` wrote."""
        return load_masks(self._mask_file(index))

    def save_masks(self, masks: Iterable[Mapping[str, PackedMask]]) -> list[Path]:
        """``masks.safetensors``, from those of the blocks."""
        with self.writing():
            save_masks({name: mask for of_block in masks for name, mask in of_block.items()}, self.path / MASKS)
        return [self.path / MASKS]

    def save_shards(
        self, source: Tensors, count: int, max_shard_size: int, progress: Callable[[str, int], Any]
    ) -> list[Path]:
        """The checkpoint: every tensor of ``source`` as it is, but for those of the ``count`` finished blocks.

        Tensors go from memory-mapped files to the new ones; none of them is held.

        Args:
            progress: as ``Reporter.progress``.
        """
        newest = {name: block for block in map(self.block, range(count)) for name in block.names()}
        shapes = source.shapes() | {name: newest[name].shapes()[name] for name in newest}
        split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
        with self.writing(), progress("saving", len(split.filename_to_tensors)) as advance:
            for done, (file, names) in enumerate(split.filename_to_tensors.items(), start=1):
                tensors = {name: newest.get(name, source)[name] for name in names}
                save_file(tensors, self.path / file, metadata={"format": "pt"})
                advance(done)
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                self.write_json(SAFE_WEIGHTS_INDEX_NAME, index)
        return [self.path / file for file in split.filename_to_tensors]

    def save_model(self, model: PreTrainedModel, max_shard_size: int) -> list[Path]:
        """The checkpoint of a model in memory, with its configuration, as transformers writes it."""
        self.save(lambda path: model.save_pretrained(path, max_shard_size=max_shard_size))
        return sorted(self.path.glob("model*.safetensors"))

    def save_settings(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """What an ordinary Hugging Face folder holds besides weights: config.json, tokenizer."""
        self.save(partial(_write_settings, model, tokenizer))

    def save(self, write: Callable[[Path], object]) -> None:
        """Let ``write``, which calls libraries, put something into the folder."""
        with self.writing(), _by_libraries("the model"):
            write(self.path)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A JSON file beside the model."""
        self.write_text(name, json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_lines(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        """A file with a JSON object a line."""
        self.write_text(name, "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines))

    def write_text(self, name: str, content: str) -> None:
        """A text file beside the model."""
        with self.writing():
            # A name on Linux need not be text: what cannot be stored is shown as an escape, as JSON has it too.
            (self.path / name).write_text(content, encoding="utf-8", errors="backslashreplace")

    def append_line(self, name: str, line: dict[str, Any]) -> None:
        """One JSON object, one line."""
        with self.writing(), (self.path / name).open("a", encoding="utf-8") as out:
            out.write(json.dumps(finite(line), allow_nan=False) + "\n")

    def commit(self) -> list[str]:
        """Make the finished folder the output, in place of an earlier run's; gives its files, which ``made_by`` lists.

        They all have the permissions that a file made now has: safetensors makes some for their owner alone.
        """
        with self.writing():
            self._check_strangers()
            listed = [name for name in _files(self.path) if Path(name).parts[0] not in _OWN]
            made = json.loads((self.path / self._made_by).read_text(encoding="utf-8"))
            self.write_json(self._made_by, made | {"files": listed})
            mode = self._mode_of_new_files()
            for file in (self.path / name for name in listed):
                if stat.S_IMODE(file.stat().st_mode) != mode:
                    file.chmod(mode)
            for file in self.path.iterdir():
                sync(file)
            sync(self.path)
            if self.final.exists():
                self.final.rename(self.path / _REPLACED)
            try:
                self.path.rename(self.final)
            except OSError:
                if (self.path / _REPLACED).exists():
                    (self.path / _REPLACED).rename(self.final)
                raise
            sync(self.final.absolute().parent)
            self._tidy()
        return listed

    # --- beginning and end ------------------------------------------------------------------------------------

    def _keep_others_out(self, opened: contextlib.ExitStack) -> None:
        """Two runs in one folder would spoil each other's work: refuse, as long as the other one's process lives."""
        marker = opened.enter_context((self.path / WORKING).open("rb"))
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EBFTError(
                f"another run is at work in {self.path}; wait for its end, or choose another --output"
            ) from None
        except OSError:
            pass  # a file system that knows no locks

    def _check_place(self, path: str) -> None:
        """Decide before any work whether both folders can be made, and one renamed to the other."""
        parent = next(folder for folder in self.path.absolute().parents if os.path.lexists(folder))
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise EBFTError(f"--output {path} cannot be written: {parent} is no folder that one can write to")
        missing = self.path.absolute().relative_to(parent).parts
        with self.writing():
            longest = os.pathconf(parent, "PC_NAME_MAX")
            for name in missing:
                if 0 < longest < len(os.fsencode(name)):
                    raise EBFTError(
                        f"--output makes {_short(name)}, a name of {len(os.fsencode(name))} bytes; expected at most "
                        f"{longest}"
                    )
            if _is_mount(self.final):
                raise EBFTError(f"--output {path} is a mount point, which no run can replace; choose a folder in it")
            probe = parent / missing[0]
            if not os.path.lexists(probe):
                with contextlib.suppress(FileExistsError):  # another rank tries it at this moment
                    probe.mkdir()
                    probe.rmdir()

    def _check_strangers(self) -> None:
        """``EBFTError`` if replacing ``OUT`` would delete a file that its run did not make."""
        if not (self.final / self._made_by).is_file():
            return
        with contextlib.suppress(ValueError, AttributeError):
            listed = read_json(self.final / self._made_by, self._made_by).get("files")
            if isinstance(listed, list):
                strangers = [name for name in _files(self.final) if name not in listed and name != WORKING]
                if strangers:
                    others = f" and {len(strangers) - 1} others" if len(strangers) > 1 else ""
                    raise EBFTError(
                        f"--overwrite would delete {strangers[0]}{others} in {self.final}, which no run made; move "
                        "what is to be kept, or choose another --output"
                    )
                return
        raise EBFTError(
            f"--overwrite: {self.final / self._made_by} does not list the files that its run made; remove the folder, "
            "or choose another --output"
        )

    def _mode_of_new_files(self) -> int:
        probe = self.path / TEMPORARY
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        return mode

    def _begin(self) -> None:
        """An empty folder that says what the run depends on."""
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in self.path.iterdir():
            if entry.name != WORKING:  # this one goes last: without it the folder would not be known as a run's
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_whole(self.path / WORKING, sealed({"fingerprint": self.fingerprint, "about": self.about}))
        for folder in (_BLOCKS, COMMITS):
            (self.path / folder).mkdir()

    def _check_fingerprint(self) -> None:
        begun = unsealed(self.path / WORKING)
        if begun is None:
            raise EBFTError(f"--resume: {self.path / WORKING} is broken; without --resume the run starts over")
        for folder in (_BLOCKS, COMMITS):
            (self.path / folder).mkdir(exist_ok=True)  # a run may end before it has made them
        before, now = begun["fingerprint"], json.loads(json.dumps(self.fingerprint))
        for heading in sorted(before.keys() | now.keys()):
            old, new = before.get(heading, {}), now.get(heading, {})
            for name in sorted(old.keys() | new.keys()):
                if old.get(name) != new.get(name):
                    raise EBFTError(
                        f"--resume: {self.path} was begun with another {heading} ({name}: {_short(old.get(name))}, now "
                        f"{_short(new.get(name))}); expected the same, or no --resume to start over"
                    )

    def _tidy(self) -> None:
        """Take from the output what only the run needed; the marker last, so that this can be gone on with."""
        for folder in _OWN[:-1]:
            if (self.final / folder).exists():
                shutil.rmtree(self.final / folder)
        (self.final / WORKING).unlink()

    def _block_file(self, index: int, by: str = "") -> Path:
        return self.path / _BLOCKS / f"{index:05d}{by and '.' + by}.safetensors"

    def _pruned_file(self, index: int) -> Path:
        return self.path / _BLOCKS / f"{index:05d}.pruned.safetensors"

    def _mask_file(self, index: int) -> Path:
        return self.path / _BLOCKS / f"{index:05d}.masks.safetensors"


def _followed(path: str) -> Path:
    """The folder that a path means: of a link, whether or not anything is there, what it leads to."""
    try:
        final = Path(path).expanduser()
        final = Path(os.path.realpath(final)) if os.path.islink(final) else final  # noqa: PTH114  (Path's raises)
        possible = b"\0" not in os.fsencode(final) and not os.path.islink(final)  # noqa: PTH114  (a link to itself)
    except (RuntimeError, UnicodeEncodeError):  # nobody has that home, no file system that letter
        possible = False
    if not possible:
        raise EBFTError(f"--output is {path!r}; expected a path that can be")
    return final


def _is_mount(folder: Path) -> bool:
    """Whether something is mounted there, be it a part of the same file system, which ``Path.is_mount`` overlooks."""
    if folder.is_mount():
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not on Linux
        return False
    return os.fsencode(os.path.realpath(folder)).replace(b" ", b"\\040") in {line.split()[4] for line in mounts}


def _files(folder: Path) -> list[str]:
    """All files and links in a folder and those inside it, by their paths in it."""
    return sorted(
        str(Path(place, name).relative_to(folder))
        for place, folders, names in os.walk(folder)
        for name in (*names, *(inside for inside in folders if Path(place, inside).is_symlink()))
    )


def is_kept(partial: Path) -> bool:
    """Whether ``OUT.partial`` holds anything that can be gone on with."""
    return any(partial.glob(f"{COMMITS}/*.json"))


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text


_NEW = {WORKING + TEMPORARY}  # all there is of a run that ended in its first moment
