"""The two sides of a comparison, each in a process of its own: llama.cpp through its C API, and qwen_rt.

A worker is started by the benchmarks as `python bench/sides.py ROLE SETTINGS`, the peer's with the interpreter of its
own environment, and answers requests, one line of JSON each. Both sides have the same methods, named by the requests;
all times are seconds and leave the prompt's preparation out. Only the standard library is imported at the top: the
peer's environment has neither torch nor qwen_rt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHORT = 16  # tokens of the prompt before a decode in an empty context


@dataclass(frozen=True)
class Settings:
    """How a side is opened."""

    path: str
    threads: int
    context: int = 1024  # tokens of each sequence
    sequences: int = 1
    cache: str = "float16"
    quantize: str | None = None  # ours: what load() rounds to
    flash: int = -1  # the peer's flash attention: -1 its own choice, 0 off, 1 on


def prompt_ids(count: int, run: int) -> list[int]:
    """Ordinary token ids, the same on both sides; another prompt each run, so that no prefix cache helps."""
    return [(i * 7919 + run * 104729) % 90000 + 100 for i in range(count)]


def peak_bytes() -> int:
    """Largest resident size of this process so far (VmHWM), mapped files included; 0 where the system does not say."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


class Peer:
    """llama.cpp: batches of tokens in, the logits asked for out, argmax by numpy."""

    def __init__(self, settings: Settings) -> None:
        import llama_cpp
        import numpy

        self.imported = time.perf_counter()
        self.lc, self.np, self.settings = llama_cpp, numpy, settings
        lc = llama_cpp
        lc.llama_backend_init()
        model_params = lc.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = lc.llama_model_load_from_file(settings.path.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {settings.path}")
        params = lc.llama_context_default_params()
        params.n_ctx = settings.context * settings.sequences
        params.n_seq_max = settings.sequences
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_threads = params.n_threads_batch = settings.threads
        params.flash_attn_type = settings.flash
        kinds = {"float32": lc.GGML_TYPE_F32, "float16": lc.GGML_TYPE_F16, "int8": lc.GGML_TYPE_Q8_0}
        params.type_k = params.type_v = kinds[settings.cache]
        self.ctx = lc.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError("llama.cpp cannot make this context")
        self.memory = lc.llama_get_memory(self.ctx)
        self.vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.filled: int | None = None  # tokens of the long prompt that the cache holds

    def first_token(self) -> None:
        """What load-to-first-token ends with."""
        self._run(prompt_ids(SHORT, 0))

    def prefill(self, tokens: int, run: int) -> float:
        """Time of a prompt of `tokens`, its first answer token chosen."""
        self._clear()
        ids = prompt_ids(tokens, run)
        start = time.perf_counter()
        for at in range(0, tokens, 2048):
            self._run(ids[at : at + 2048])
        return time.perf_counter() - start

    def decode(self, tokens: int, run: int) -> float:
        """Time of `tokens` steps of one token after a short prompt."""
        self._clear()
        return self._steps(self._run(prompt_ids(SHORT, run)), tokens)

    def decode_at(self, context: int, tokens: int) -> float:
        """As decode, after a prompt of `context` tokens, which is computed once and rolled back to."""
        if self.filled != context:
            self._clear()
            for at in range(0, context, 2048):
                token = self._run(prompt_ids(context, 0)[at : at + 2048])
            self.filled, self.token = context, token
        seconds = self._steps(self.token, tokens)
        if not self.lc.llama_memory_seq_rm(self.memory, 0, context, -1):
            raise RuntimeError("llama.cpp cannot roll its cache back")
        return seconds

    def decode_batch(self, tokens: int, run: int) -> float:
        """Time of `tokens` steps, each with one token of every sequence."""
        self._clear()
        rows = range(self.settings.sequences)
        prompts = [prompt_ids(SHORT, run * len(rows) + row) for row in rows]
        entries = [(token, at, row, at == SHORT - 1) for row in rows for at, token in enumerate(prompts[row])]
        chosen = self._batch(entries).argmax(1).tolist()
        start = time.perf_counter()
        for at in range(SHORT, SHORT + tokens):
            chosen = self._batch([(chosen[row], at, row, True) for row in rows]).argmax(1).tolist()
        return time.perf_counter() - start

    def scores(self, ids: list[int], step: int) -> list[float]:
        """Log-probability of ids[1:], each given all before it; `step` tokens are computed at a time."""
        np, found = self.np, []
        self._clear()
        for at in range(0, len(ids), step):
            part = ids[at : at + step]
            logits = self._batch([(token, at + i, 0, True) for i, token in enumerate(part)])
            for row, target in zip(logits, ids[at + 1 : at + 1 + step], strict=False):
                top = row.max()
                found.append(float(row[target] - top - np.log(np.exp(row - top).sum(dtype=np.float64))))
        return found

    def _clear(self) -> None:
        self.lc.llama_memory_clear(self.memory, True)
        self.filled = None

    def _run(self, ids: list[int]) -> int:
        """Append tokens to sequence 0; the likeliest next one."""
        tokens = (self.lc.llama_token * len(ids))(*ids)
        if self.lc.llama_decode(self.ctx, self.lc.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")
        logits = self.lc.llama_get_logits_ith(self.ctx, -1)
        return int(self.np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def _steps(self, token: int, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            token = self._run([token])
        return time.perf_counter() - start

    def _batch(self, entries: list[tuple[int, int, int, bool]]) -> Any:
        """(token, position, sequence, logits wanted) of each row -> logits [wanted, vocab], overwritten by the next."""
        batch = self.lc.llama_batch_init(len(entries), 0, 1)
        try:
            batch.n_tokens = len(entries)
            for i, (token, position, sequence, wanted) in enumerate(entries):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if self.lc.llama_decode(self.ctx, batch) != 0:
                raise RuntimeError("llama_decode failed")
        finally:
            self.lc.llama_batch_free(batch)
        rows = sum(entry[3] for entry in entries)
        return self.np.ctypeslib.as_array(self.lc.llama_get_logits(self.ctx), (rows, self.vocab))


class Ours:
    """qwen_rt through its public API; the engine times prefill and decode itself."""

    def __init__(self, settings: Settings) -> None:
        os.environ["QWEN_RT_THREADS"] = str(settings.threads)
        from qwen_rt import load

        self.imported = time.perf_counter()
        self.settings = settings
        self.model = load(
            settings.path,
            device="cpu",
            quantize=settings.quantize,  # type: ignore[arg-type]
            kv_cache=settings.cache,  # type: ignore[arg-type]
            max_model_len=settings.context,
            max_batch=settings.sequences,
        )

    def first_token(self) -> None:
        """What load-to-first-token ends with."""
        self._generate([prompt_ids(SHORT, 0)], 1)

    def prefill(self, tokens: int, run: int) -> float:
        """Time of a prompt of `tokens`, its first answer token chosen."""
        return self._generate([prompt_ids(tokens, run)], 1)[0].prefill_seconds

    def decode(self, tokens: int, run: int) -> float:
        """Time of `tokens` steps of one token after a short prompt (whose own token comes out of the prefill)."""
        return self._generate([prompt_ids(SHORT, run)], tokens + 1)[0].decode_seconds

    def decode_at(self, context: int, tokens: int) -> float:
        """As decode, after a prompt of `context` tokens, which the prefix cache holds from the second call on."""
        return self._generate([prompt_ids(context, 0)], tokens + 1)[0].decode_seconds

    def decode_batch(self, tokens: int, run: int) -> float:
        """Time of `tokens` steps, each with one token of every sequence: the prompts' own step comes before all."""
        rows = range(self.settings.sequences)
        done = self._generate([prompt_ids(SHORT, run * len(rows) + row) for row in rows], tokens + 1)
        return max(one.decode_seconds for one in done)

    def _generate(self, prompts: list[list[int]], count: int) -> list[Any]:
        done = self.model.generate(
            prompts, max_new_tokens=count, temperature=0, repetition_penalty=1.0, ignore_eos=True
        )
        assert all(len(one.ids) == count for one in done)
        return done


ROLES: dict[str, type[Peer] | type[Ours]] = {"peer": Peer, "ours": Ours}


class Worker:
    """A side in its own process. `started` says how long it took from its start to its first token, and where."""

    def __init__(self, python: str, role: str, settings: Settings) -> None:
        start = time.perf_counter()
        # Users' Pythons keep compiled modules; some test machines are told not to.
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        env["OMP_NUM_THREADS"] = str(settings.threads)
        self.process = subprocess.Popen(
            [python, __file__, role, json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if role == "peer" else None,  # it logs thousands of lines
            text=True,
            env=env,
        )
        answer = self._read()
        total = time.perf_counter() - start
        self.peak_bytes = int(answer.pop("peak"))
        # What the worker cannot see of its own start: the interpreter's.
        self.started = {"total": total, "interpreter": total - sum(answer.values()), **answer}

    def ask(self, method: str, **arguments: Any) -> Any:
        """The result of one method."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        return self._read()["result"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker died with code {self.process.wait()}: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]
        return json.loads(line)


def serve(role: str, settings: Settings) -> None:
    """Load, make one token, say how long each part took; then answer requests until the input ends."""
    start = time.perf_counter()
    side = ROLES[role](settings)
    loaded = time.perf_counter()
    side.first_token()
    done = time.perf_counter()
    parts = {"imports": side.imported - start, "load": loaded - side.imported, "first token": done - loaded}
    print(json.dumps({**parts, "peak": peak_bytes()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"result": getattr(side, request["method"])(**request["arguments"])}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Settings(**json.loads(sys.argv[2])))
