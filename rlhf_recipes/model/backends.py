"""Other ways to sample a rollout than the package's own (`native`, `eager`): transformers' three, and vLLM.

A backend takes a role and prompts (token ids) and returns the responses, (t,) token ids each on the model's device.
What follows a response's first stop token means nothing. Whatever sampled them, log-probabilities are computed anew by
the forward that trains. B rows, P prompt tokens (left-padded), T response tokens.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import StaticCache
from transformers.generation import ContinuousBatchingConfig

from ..records.manifest import installed_version
from .decode import cache_argument
from .sampler import Backend, Sampler
from .shared import SharedBase

VLLM_VERSIONS = ">=0.26,<0.33"  # 0.33 wants a later torch than this package takes
# What quantizes with bitsandbytes from 0.28 on. Before, vLLM does it itself, and the two register the same operation.
VLLM_QUANTIZER, QUANTIZER_SINCE = "vllm-bnb-plugin", "0.28"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its max_lora_rank may be


def check_backend(name: str, quantization: str | None, dtype: torch.dtype) -> None:
    """Raises ValueError if a backend cannot run on this machine, or not on such a base.

    Args:
        quantization: the recipe's `base.quantization`.
        dtype: of the base's activations, `precision(base)`.
    """
    if name != "vllm":
        return
    option = "ppo.generation_backend=vllm"
    installed = installed_version("vllm")
    if installed is None or installed not in SpecifierSet(VLLM_VERSIONS):
        raise ValueError(
            f"{option} needs vLLM {VLLM_VERSIONS}, and there is {f'vLLM {installed}' if installed else 'none'}: "
            "pip install 'rlhf_recipes[vllm]', or set ppo.generation_backend=native."
        )
    if not torch.cuda.is_available():
        raise ValueError(f"{option} needs a CUDA device, and there is none: set ppo.generation_backend=native.")
    outside = Version(installed) >= Version(QUANTIZER_SINCE)
    if quantization == "nf4" and outside != bool(installed_version(VLLM_QUANTIZER)):
        wrong = "quantizes with bitsandbytes only beside" if outside else "does not run beside"
        mend = "" if outside else "un"
        raise ValueError(
            f"{option}: vLLM {installed} {wrong} {VLLM_QUANTIZER}: pip {mend}install {VLLM_QUANTIZER}, "
            "or set base.quantization=none."
        )
    if quantization == "int8":
        raise ValueError(f"{option} cannot quantize to 8 bits while loading: set base.quantization to nf4 or none.")
    if dtype == torch.float32:
        raise ValueError(f"{option} has LoRA in 16 bits only: set base.dtype=bfloat16.")


def make_backend(
    name: str,
    sampler: Sampler,
    gpu_memory_utilization: float = 0.3,
    enable_sleep_mode: bool = False,
    max_model_length: int | None = None,
) -> Backend:
    """The backend `name` for a sampler, whose model, temperature, stop tokens, lengths and batch size it takes.

    The other arguments are of `vllm`: see `VLLM`. Raises ValueError as `check_backend` does.
    """
    if name in ("native", "eager"):
        sampler._static = None if name == "native" else False
        return sampler.generate
    if name == "vllm":
        return VLLM(sampler, gpu_memory_utilization, enable_sleep_mode, max_model_length)
    return {"generate": Generate, "static": Static, "continuous": Continuous}[name](sampler)


def generation_config(sampler: Sampler) -> GenerationConfig:
    """Sampling by temperature and nothing else, as transformers takes it."""
    return GenerationConfig(
        do_sample=True,
        temperature=sampler.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampler.response_length,
        eos_token_id=sampler.stop_token_ids,
        pad_token_id=sampler.pad_token_id,
        use_cache=True,
    )


@contextmanager
def sampling(model: SharedBase, role: str) -> Iterator[None]:
    """A role active, without gradients and in evaluation mode: checkpointing would switch the KV cache off."""
    training = model.training
    model.eval()
    try:
        with model.role(role), torch.no_grad():
            yield
    finally:
        model.train(training)


class Generate:
    """transformers' `generate`, the plain reference."""

    cache: StaticCache | None = None

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.config = generation_config(sampler)

    def __call__(self, role: str, prompts: list[list[int]]) -> list[Tensor]:
        sampler, responses = self.sampler, [torch.empty(0)] * len(prompts)

        def work(rows: Tensor) -> None:
            for row, response in zip(rows.tolist(), self.batch([prompts[row] for row in rows.tolist()]), strict=True):
                responses[row] = response

        with sampling(sampler.model, role), sampler.autocast():
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            sampler.in_batches(lengths, work, of_one_length=not sampler.model.caching.left_padding)
        return responses

    def batch(self, prompts: list[list[int]]) -> Tensor:
        """Responses (B, T) to prompts that fit into one batch."""
        ids, kept = self.sampler.pad_left(prompts)  # (B, P)
        model = self.sampler.model.causal
        output = model.generate(
            input_ids=ids, attention_mask=kept, generation_config=self.config, **cache_argument(model, self.cache)
        )
        return output[:, ids.shape[1] :]


class Static(Generate):
    """`generate` with a KV cache of fixed size, which lets transformers compile the decoding step on CUDA.

    All batches of a call have the same shape and share one cache, so that the step is compiled once for each role and
    its CUDA graph is recorded once a call. transformers compiles no base that bitsandbytes has quantized: there, as on
    a CPU, this is `generate` with more attention to compute.
    """

    rows = 0  # of the cache

    def __call__(self, role: str, prompts: list[list[int]]) -> list[Tensor]:
        # The longest prompt varies from call to call, its multiple of 64 seldom.
        self.length = -(-max(map(len, prompts)) // 64) * 64 + self.sampler.response_length
        self.most = len(prompts)
        try:
            return super().__call__(role, prompts)
        finally:
            self.cache = None  # the memory is training's

    def batch(self, prompts: list[list[int]]) -> Tensor:
        """As `Generate.batch`, of `batch_size` rows always: where prompts are fewer, the last one fills up."""
        rows = min(self.sampler.batch_size, self.most)
        if self.cache is None or self.rows != rows:
            config = self.sampler.model.causal.config.get_text_config()
            self.cache, self.rows = StaticCache(config=config, max_cache_len=self.length), rows
        self.cache.reset()
        filled = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
        return super().batch(filled)[: len(prompts)]


class Continuous(Generate):
    """transformers' continuous batching: a paged KV cache, and a waiting row for each that finishes.

    `batch_size` rows are under way at a time, and the cache has room for as many of the greatest length. It is best
    with FlashAttention. With PyTorch's own attention, the one there is on a CPU, each token is compared with the cache
    of every other row, and that is masked: slow where there are many rows.
    """

    def __call__(self, role: str, prompts: list[list[int]]) -> list[Tensor]:
        sampler = self.sampler
        model, rows = sampler.model.causal, min(sampler.batch_size, len(prompts))
        settings = ContinuousBatchingConfig(
            max_requests_per_batch=rows,
            max_batch_tokens=max(rows, 1024),
            safety_margin=0.0,
            seed=int(torch.randint(2**31, ())),
        )
        longest = max(map(len, prompts)) + sampler.response_length
        # Room for what the rows need; by default it is most of what the machine has left.
        page: int = getattr(settings, "page_size", None) or vars(settings)["block_size"]  # in older transformers
        settings.num_blocks = rows * (longest // page + 1)
        # transformers seeds the global generators; what is drawn after a rollout is not to follow from that.
        with sampling(sampler.model, role), torch.random.fork_rng():
            # A new manager each time: a kept one would share the keys of prompts with other adapters' rollouts.
            results = list(model.generate_batch(prompts, self.config, settings).values())
        errors = [result.error for result in results if result.error]
        if errors or len(results) < len(prompts):
            raise RuntimeError(errors[0] if errors else "transformers' continuous batching ended early.")
        return [torch.tensor(result.generated_tokens, device=sampler.model.device) for result in results]


class VLLM:
    """vLLM in this process, on a copy of the base of its own: the policy's adapter goes there before each rollout.

    The copy takes as much memory as the training base does (about 4 GiB for 7B in NF4, 14 GiB in bfloat16), within
    `gpu_memory_utilization`. With sleep mode it lies in the CPU's memory while nothing is sampled, and its KV cache is
    freed; waking takes the time of one copy over the bus. Its sampling is in 16 bits.
    """

    def __init__(
        self,
        sampler: Sampler,
        gpu_memory_utilization: float = 0.3,
        enable_sleep_mode: bool = False,
        max_model_length: int | None = None,
    ) -> None:
        """
        Args:
            gpu_memory_utilization: share of the GPU for vLLM's weights, activations and KV cache.
            enable_sleep_mode: put its weights aside and free its KV cache while nothing is sampled.
            max_model_length: longest prompt and response together, in tokens; None: the model's own.
        """
        config = sampler.model.causal.config
        four_bits = getattr(getattr(config, "quantization_config", None), "load_in_4bit", False)
        eight_bits = getattr(getattr(config, "quantization_config", None), "load_in_8bit", False)
        dtype = sampler.model.causal.dtype
        check_backend("vllm", "nf4" if four_bits else "int8" if eight_bits else None, dtype)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a process of its own would hold another CUDA context
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self.sampler, self.sleeps, self.version = sampler, enable_sleep_mode, 0
        assert sampler.model.peft is not None
        rank = max(adapter.r for adapter in sampler.model.peft.peft_config.values())
        with torch.random.fork_rng():  # vLLM seeds the global generators
            self.llm = LLM(
                config._name_or_path,
                revision=getattr(config, "_commit_hash", None),
                trust_remote_code=type(sampler.model.causal).__module__.startswith("transformers_modules"),
                generation_config="vllm",  # none of the model's own settings
                dtype=str(dtype).removeprefix("torch."),
                quantization="bitsandbytes" if four_bits else None,  # vLLM's is NF4 with double quantization too
                enable_lora=True,
                max_lora_rank=min(allowed for allowed in VLLM_RANKS if allowed >= rank),
                max_model_len=max_model_length,
                max_num_seqs=sampler.batch_size,
                gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep_mode=enable_sleep_mode,
            )
        if self.sleeps:
            self.llm.sleep()

    def __call__(self, role: str, prompts: list[list[int]]) -> list[Tensor]:
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

        sampler = self.sampler
        params = [
            SamplingParams(
                temperature=sampler.temperature,
                max_tokens=sampler.response_length,
                stop_token_ids=sampler.stop_token_ids,
                ignore_eos=True,  # the checkpoint's own, which need not be ours
                seed=seed,
                detokenize=False,
            )
            for seed in torch.randint(2**31, (len(prompts),)).tolist()
        ]
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        if self.sleeps:
            torch.cuda.empty_cache()
            self.llm.wake_up()
        with self.adapter(role) as adapter:
            results = self.llm.generate(inputs, params, lora_request=adapter, use_tqdm=False)
        if self.sleeps:
            self.llm.sleep()
        return [torch.tensor(result.outputs[0].token_ids, device=sampler.model.device) for result in results]

    @contextmanager
    def adapter(self, role: str) -> Iterator[object]:
        """A role's adapter as it is now, under a number that vLLM has not seen and so has nothing cached for."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        if role == "base":
            yield None
            return
        self.version += 1
        with tempfile.TemporaryDirectory() as folder:
            self.sampler.model.save_role(role, Path(folder))
            yield LoRARequest(f"{role}-{self.version}", self.version, folder)
