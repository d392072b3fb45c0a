"""The generate command on one rank: check everything, build the stage, serve prompts."""

import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch.distributed as dist

from stagdist.decode.engine import Engine
from stagdist.decode.frontend.answers import Answers
from stagdist.decode.frontend.command_line import say
from stagdist.decode.frontend.deployment import deploy
from stagdist.decode.frontend.interrupts import Interrupts
from stagdist.decode.frontend.prompts import (
    Prompt,
    PromptEncoding,
    check_prompts_file,
    make_request,
    prompts_from_arguments,
    prompts_from_file,
    prompts_from_lines,
)
from stagdist.decode.operations import operate
from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime.build import EngineOptions, joined_world
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.errors import ConfigError, StagdistError, TransportError
from stagdist.parallel.device import on_cuda
from stagdist.parallel.world import World
from stagdist.telemetry.clocks import EventClock, HostClock
from stagdist.telemetry.pulse import Pulse
from stagdist.telemetry.spans import SpanRecorder, merge_traces


class Generation:
    """One run of the generate command on one rank.

    The constructor checks everything that can be wrong before a process group exists, and builds nothing.

    Args:
        model: model directory.
        options: how the model is run.
        params: sampling parameters of prompts that have none; prompt i uses seed + i.
        world: this process among all.
        prompts: texts from the command line.
        prompts_file: read if there are no `prompts`; without both, standard input is read.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        as_json: answers are JSON objects, one per line.
        trace: Chrome trace to write; missing folders are created.
        encoding: how prompts become token ids.

    Raises:
        CheckpointError: the model directory is incomplete or of another shape; names the tensor. Or the tokens that
            end texts are not tokens; names the key.
        DataError: it has no tokenizer, or one that gives ids that the model lacks.
        ConfigError: the grid, the device or a file does not fit.
    """

    def __init__(
        self,
        model: Path,
        options: EngineOptions,
        params: SamplingParams,
        world: World,
        *,
        prompts: Sequence[str] = (),
        prompts_file: Path | None = None,
        device: str = "auto",
        as_json: bool = False,
        trace: Path | None = None,
        encoding: PromptEncoding | None = None,
    ):
        self._params, self._world, self._as_json, self._trace = params, world, as_json, trace
        self._prompts, self._prompts_file = prompts, prompts_file
        self._deployment = deploy(model, options, world, device)
        self.plan, self._tokenizer = self._deployment.plan, self._deployment.tokenizer
        self._encoding = encoding or PromptEncoding()
        if self._encoding.chat and not self._tokenizer.has_chat_template:
            raise ConfigError(f"--chat needs a chat template, and {model} has none; leave --chat out")
        if prompts_file is not None:
            check_prompts_file(prompts_file)
        elif not prompts and sys.stdin is None and world.rank == 0:
            raise ConfigError("there are no prompts: give --prompt, --prompts-file or lines on standard input")
        if trace is not None:
            _check_trace(trace)

    def run(self, interrupts: Interrupts | None, pulse: Pulse) -> int:
        """Build this rank's stage and work until all prompts are answered or rank 0 is interrupted.

        Args:
            interrupts: on rank 0.
            pulse: signs of life for a supervisor.

        Returns:
            Exit code: 0 all prompts served, 1 some were not, 130 or 143 interrupted, 141 the output has no reader.

        Raises:
            TransportError: a rank has ended; names stage and step.
        """
        try:
            with joined_world(self.plan, self._deployment.device) as transport:
                recorder = None if self._trace is None else self._recorder(transport)
                stage = self._deployment.build(transport, pulse, recorder=recorder)
                code = 0
                if interrupts is None:
                    operate(stage, transport, None)
                else:
                    code = self._serve(stage, transport, interrupts)
                if self._trace is not None and recorder is not None:
                    _write_trace(self._trace, recorder, self._world)
            return code
        except TransportError:
            # The launcher may have ended the others on the same signal.
            if interrupts is None or interrupts.code is None:
                raise
            return interrupts.code

    def _recorder(self, transport: Transport | None) -> SpanRecorder:
        clock = EventClock() if on_cuda(self._deployment.device) else HostClock()
        return SpanRecorder(rank=self._world.rank, stage=0 if transport is None else transport.stage, clock=clock)

    # --- rank 0: read prompts, run the engine, print answers ----------------------------------------------------

    def _serve(self, stage: Stage, transport: Transport | None, interrupts: Interrupts) -> int:
        """Serve all prompts; the exit code."""
        engine = self._deployment.engine(stage, transport)
        answers = Answers(sys.stdout, sys.stderr, self._tokenizer.decode, engine.stop, as_json=self._as_json)
        interrupts.stop_with(engine.stop)
        self._announce()
        errors: list[Exception] = []

        def submit_all() -> None:
            """Give every prompt to the engine as soon as it is read."""
            try:
                for prompt in self._read_prompts():
                    self._submit(prompt, engine, answers)
            except Exception as error:  # raised again by the main thread
                errors.append(error)
                engine.stop()
            else:
                engine.close()

        if self._prompts or self._prompts_file is not None:
            submit_all()
        else:  # reads of standard input cannot be interrupted
            threading.Thread(target=submit_all, daemon=True, name="prompts").start()
        try:
            engine.run(answers.take)
        except TransportError:
            if interrupts.code is None:
                answers.end()
            else:
                self._conclude(engine, answers, errors, interrupts.code)
            raise
        return self._conclude(engine, answers, errors, interrupts.code)

    def _read_prompts(self) -> Iterator[Prompt]:
        if self._prompts:
            return prompts_from_arguments(self._prompts)
        if self._prompts_file is not None:
            return prompts_from_file(self._prompts_file)
        # readline returns a line as soon as it arrives.
        stream: BinaryIO = sys.stdin.buffer
        return prompts_from_lines(iter(stream.readline, b""), "standard input")

    def _submit(self, prompt: Prompt, engine: Engine, answers: Answers) -> None:
        try:
            request = make_request(prompt, self._params, self._tokenizer, self._encoding)
            wanted = request.params.logprobs, request.params.prompt_logprobs
            if wanted != (None, None) and not self._as_json:
                raise ConfigError(f"{prompt.place} asks for logprobs, which plain text cannot show; add --json")
            engine.check(request)
        except ConfigError as error:
            answers.refuse(prompt, str(error))
        else:
            answers.accept(prompt, request)
            engine.submit(request)

    def _conclude(self, engine: Engine, answers: Answers, errors: list[Exception], code: int | None) -> int:
        """Print what is left and the summary; the exit code. `code` is that of an interrupt."""
        unfinished = answers.end()
        if answers.broken:
            return 141
        # After an interrupt the engine refuses what is still being read: that is no error.
        for error in errors if code is None else ():
            if isinstance(error, OSError):
                raise StagdistError(f"the prompts cannot be read: {error}") from error
            raise error
        if answers.taken == 0 and code is None:
            raise StagdistError("there were no prompts: give --prompt, --prompts-file or lines on standard input")
        say(f"{answers.summary()}; {self._deployment.grid_text()}")
        if self.plan.options.want_margins:
            say(f"smallest top-2 margin {engine.smallest_margin:.3g}")
        if code is not None:
            say(
                f"interrupted; {unfinished} prompt{'s' * (unfinished != 1)} unfinished" if unfinished else "interrupted"
            )
            return code
        return 1 if answers.failed else 0

    def _announce(self) -> None:
        model = self.plan.model
        if model.staggered and model.stagger == 0 and model.num_sections > 1:
            say("stagger is 0: within a step the sections run one after the other, not side by side")
        if not self._prompts and self._prompts_file is None and sys.stdin.isatty():
            say("one prompt per line; Ctrl-D ends")


def _check_trace(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--trace {path} is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # the trace is written under another name first
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--trace {path} cannot be written: {reason}; give a file in a writable folder") from error


def _write_trace(path: Path, recorder: SpanRecorder, world: World) -> None:
    """Every rank writes its own trace, and rank 0 merges them."""
    parts = [path.with_name(f"{path.name}.rank{rank}") for rank in range(world.size)]
    try:
        recorder.write_trace(parts[world.rank])
        if world.size > 1:
            dist.barrier()
        if world.rank > 0:
            return
        merge_traces(parts, path)
        for part in parts:
            part.unlink()
    except OSError as error:
        raise StagdistError(f"the trace {path} cannot be written: {error}; all ranks must see its folder") from error
    print(f"trace of {world.size} ranks: {path} (open it at https://ui.perfetto.dev)", file=sys.stderr)
