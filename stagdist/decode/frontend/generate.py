"""One run of the generate command on this rank: everything is checked first, then prompts become answers."""

import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch.distributed as dist

from stagdist.checkpoint.published.model_json import read_text_tokens
from stagdist.checkpoint.published.reader import ModelReader
from stagdist.data.tokenizer import Tokenizer, load_tokenizer
from stagdist.decode.engine import Engine
from stagdist.decode.frontend.answers import Answers
from stagdist.decode.frontend.interrupts import Interrupts
from stagdist.decode.frontend.prompts import (
    Prompt,
    check_prompts_file,
    make_request,
    prompts_from_arguments,
    prompts_from_file,
    prompts_from_lines,
)
from stagdist.decode.operations import operate
from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime.build import (
    DecodePlan,
    EngineOptions,
    build_stage,
    default_precision,
    joined_world,
    plan_decoding,
)
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.errors import ConfigError, StagdistError, TransportError
from stagdist.parallel.device import on_cuda
from stagdist.parallel.world import choose_device
from stagdist.telemetry.clocks import EventClock, HostClock
from stagdist.telemetry.pulse import Pulse
from stagdist.telemetry.spans import SpanRecorder, merge_traces

HEARTBEATS = 3
"""An idle engine lets the other ranks hear from it this often within the timeout."""


@dataclass(frozen=True)
class Task:
    """What the command was asked to do.

    Attributes:
        model: model directory.
        engine: how it is run.
        params: sampling parameters of prompts that bring none; prompt i uses seed + i.
        prompts: texts from the command line.
        prompts_file: read when there are no `prompts`; without both, standard input is.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        as_json: answers are JSON objects, one per line.
        trace: Chrome trace to write; folders that are missing are made.
    """

    model: Path
    engine: EngineOptions
    params: SamplingParams
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    device: str = "auto"
    as_json: bool = False
    trace: Path | None = None


@dataclass(frozen=True)
class Place:
    """This process in the world that a launcher made."""

    rank: int
    world_size: int
    local_rank: int


@dataclass(frozen=True)
class Prepared:
    """A task that can be done: checked, nothing built yet."""

    task: Task
    place: Place
    reader: ModelReader
    plan: DecodePlan
    tokenizer: Tokenizer
    end_tokens: frozenset[int]
    device: str


def prepare(task: Task, place: Place) -> Prepared:
    """Check everything that can be wrong before any process group exists.

    Raises:
        CheckpointError: the model directory is incomplete or of another shape; names the tensor. Or the tokens that
            end texts are no tokens; names the key.
        DataError: it has no tokenizer.
        ConfigError: the grid, the device or a file does not fit.
    """
    reader = ModelReader(task.model)
    device = choose_device(task.device, place.local_rank)
    options = replace(task.engine, precision=task.engine.precision or default_precision(device))
    plan = plan_decoding(reader.model, options, place.world_size)
    tokenizer = load_tokenizer(task.model)
    end_tokens = _end_tokens(task.model, tokenizer)
    if task.prompts_file is not None:
        check_prompts_file(task.prompts_file)
    elif not task.prompts and sys.stdin is None and place.rank == 0:
        raise ConfigError("there are no prompts: give --prompt, --prompts-file or lines on standard input")
    if task.trace is not None:
        _check_trace(task.trace)
    return Prepared(task, place, reader, plan, tokenizer, end_tokens, device)


def _end_tokens(model: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """What ends a text: the tokenizer's end of document, which ended those of training, and what `transformers` has."""
    stated = read_text_tokens(model)
    tokens = None if stated is None else stated.generation.get("eos_token_id")
    several = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    return frozenset([tokenizer.end_of_document, *several])


def generate(prepared: Prepared, interrupts: Interrupts | None, pulse: Pulse) -> int:
    """Build this rank's stage and work until all prompts are answered or rank 0 is interrupted.

    Args:
        interrupts: on rank 0.
        pulse: signs of life for a supervisor.

    Returns:
        Exit code: 0 all prompts served, 1 some were not, 130 or 143 interrupted, 141 nobody reads the output.

    Raises:
        TransportError: a rank is gone; names stage and step.
    """
    try:
        return _work(prepared, interrupts, pulse)
    except TransportError:
        # The launcher may have ended the others on the same signal.
        if interrupts is None or interrupts.code is None:
            raise
        return interrupts.code


def _work(prepared: Prepared, interrupts: Interrupts | None, pulse: Pulse) -> int:
    task = prepared.task
    with joined_world(prepared.plan, prepared.device) as transport:
        recorder = _recorder(prepared, transport) if task.trace is not None else None
        stage = build_stage(
            prepared.plan,
            prepared.reader.read,
            prepared.device,
            transport,
            recorder=recorder,
            progress=None if interrupts is None else _show_captures,
        )
        stage.pulse = pulse
        if interrupts is None:
            operate(stage, transport, None)
            code = 0
        else:
            code = _Server(prepared, stage, transport, interrupts).run()
        if task.trace is not None and recorder is not None:
            _write_trace(task.trace, recorder, prepared.place)
    return code


class _Server:
    """Rank 0: reads prompts, runs the engine, prints answers."""

    def __init__(self, prepared: Prepared, stage: Stage, transport: Transport | None, interrupts: Interrupts):
        self._prepared, self._interrupts = prepared, interrupts
        self._engine = Engine(
            stage,
            transport,
            tokenizer=prepared.tokenizer,
            end_tokens=prepared.end_tokens,
            heartbeat_s=prepared.plan.options.timeout_s / HEARTBEATS,
        )
        self._answers = Answers(
            sys.stdout,
            sys.stderr,
            prepared.tokenizer.decode,
            self._engine.stop,
            as_json=prepared.task.as_json,
        )
        self._reading_error: Exception | None = None
        interrupts.stop = self._engine.stop

    def run(self) -> int:
        """Serve all prompts; the exit code."""
        self._say_what_runs()
        task = self._prepared.task
        if task.prompts or task.prompts_file is not None:
            self._submit_all()
        else:
            threading.Thread(target=self._submit_all, daemon=True, name="prompts").start()
        try:
            self._engine.run(self._answers.take)
        except TransportError:
            cut_off = self._answers.end()
            if self._interrupts.code is not None:
                self._conclude(cut_off)
            raise
        return self._conclude(self._answers.end())

    def _submit_all(self) -> None:
        """Give every prompt to the engine as soon as it is there. For standard input this is a thread of its own."""
        task = self._prepared.task
        try:
            for prompt in _prompts(task):
                self._submit(prompt)
        except Exception as error:  # raised again by the main thread
            self._reading_error = error
            self._engine.stop()
        else:
            self._engine.close()

    def _submit(self, prompt: Prompt) -> None:
        try:
            request = make_request(prompt, self._prepared.task.params, self._prepared.tokenizer)
            if request.params.logprobs is not None and not self._prepared.task.as_json:
                raise ConfigError(f"{prompt.place} asks for logprobs, which plain text cannot show; add --json")
        except ConfigError as error:
            self._answers.refuse(prompt, str(error))
        else:
            self._answers.accept(prompt, request)
            self._engine.submit(request)

    def _conclude(self, cut_off: int) -> int:
        code, answers = self._interrupts.code, self._answers
        if answers.broken:
            return 141
        # After an interrupt the engine refuses what is still being read: that is no error.
        if self._reading_error is not None and code is None:
            if isinstance(self._reading_error, OSError):
                raise StagdistError(f"the prompts cannot be read: {self._reading_error}") from self._reading_error
            raise self._reading_error
        if answers.taken == 0 and code is None:
            raise StagdistError("there were no prompts: give --prompt, --prompts-file or lines on standard input")
        self._say(f"{answers.summary()}; {self._grid()}")
        if self._prepared.plan.options.want_margins:
            self._say(f"smallest top-2 margin {self._engine.smallest_margin:.3g}")
        if code is not None:
            unfinished = f"; {cut_off} prompt{'s' * (cut_off != 1)} unfinished" if cut_off else ""
            self._say(f"interrupted{unfinished}")
            return code
        return 1 if answers.failed else 0

    def _say_what_runs(self) -> None:
        model = self._prepared.plan.model
        if model.staggered and model.stagger == 0 and model.num_sections > 1:
            self._say("stagger is 0: within a step the sections run one after the other, not side by side")
        task = self._prepared.task
        if not task.prompts and task.prompts_file is None and sys.stdin.isatty():
            self._say("one prompt per line; Ctrl-D ends")

    def _grid(self) -> str:
        plan = self._prepared.plan
        grid, options = plan.grid, plan.options
        layout = "1 process" if grid.world_size == 1 else f"pipe {grid.pipe} x tensor {grid.tensor}"
        head = f", {options.head} head" if grid.pipe > 1 else ""
        return f"{layout}, {plan.model.num_sections} sections{head}, {options.precision} on {self._device_name()}"

    def _device_name(self) -> str:
        return self._prepared.device.partition(":")[0]

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _prompts(task: Task) -> Iterator[Prompt]:
    if task.prompts:
        return prompts_from_arguments(task.prompts)
    if task.prompts_file is not None:
        return prompts_from_file(task.prompts_file)
    # readline gives a line as soon as it is there.
    stream: BinaryIO = sys.stdin.buffer
    return prompts_from_lines(iter(stream.readline, b""), "standard input")


def _check_trace(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--trace {path} is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # the trace is written aside and then renamed
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--trace {path} cannot be written: {reason}; give a file in a folder of yours") from error


def _show_captures(done: int, total: int) -> None:
    """Progress of capturing CUDA graphs: one line that is overwritten on a terminal, the last one elsewhere."""
    terminal = sys.stderr.isatty()
    if terminal or done == total:
        text = f"captured {done} of {total} CUDA graphs"
        print(f"\r{text}" if terminal else text, end="\n" if done == total else "", file=sys.stderr, flush=True)


def _recorder(prepared: Prepared, transport: Transport | None) -> SpanRecorder:
    return SpanRecorder(
        rank=prepared.place.rank,
        stage=0 if transport is None else transport.stage,
        clock=EventClock() if on_cuda(prepared.device) else HostClock(),
    )


def _write_trace(path: Path, recorder: SpanRecorder, place: Place) -> None:
    """Every rank writes its own, rank 0 lays them together."""
    parts = [path.with_name(f"{path.name}.rank{rank}") for rank in range(place.world_size)]
    try:
        recorder.write_trace(parts[place.rank])
        if place.world_size > 1:
            dist.barrier()
        if place.rank > 0:
            return
        merge_traces(parts, path)
        for part in parts:
            part.unlink()
    except OSError as error:
        raise StagdistError(f"the trace {path} cannot be written: {error}; all ranks must see its folder") from error
    print(f"trace of {place.world_size} ranks: {path} (open it at https://ui.perfetto.dev)", file=sys.stderr)
