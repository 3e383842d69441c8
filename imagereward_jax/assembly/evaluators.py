"""Evaluators of runs, and the exports that follow from what they measure."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from imagereward_jax.assembly import encoded
from imagereward_jax.assembly.conditions import iterate, load_pairs_of
from imagereward_jax.assembly.given import held_out_rows
from imagereward_jax.assembly.judges import BatchScorer, distance_within, embed_pixels, over_prompts
from imagereward_jax.data.groups import padded
from imagereward_jax.data.shapes import fully_right
from imagereward_jax.methods.base import Evaluation, Export, ImageSamples, Params
from imagereward_jax.methods.ranking import pair_losses
from imagereward_jax.pipelines.sample import ImageSampler
from imagereward_jax.rewards.imagereward import CONFIG_FILE, ImageReward
from imagereward_jax.rewards.mixed import NO_VERDICT
from imagereward_jax.storage.contact_sheet import contact_sheet, to_uint8
from imagereward_jax.storage.files import write_text
from imagereward_jax.training.mesh import put_replicated_rows, replicated
from imagereward_jax.training.progress import foretelling
from imagereward_jax.weights.diffusers import INDEX

COMPARED = ("eval/reward_mean", "eval/checker_rate")  # metrics that are measured at every guidance scale
TEST_SHAPES = {"size": 512, "seed": 1}  # the shapes world has no end: so many groups, drawn for the test alone


def generation_of(config: Any, pipeline: Any) -> Any:
    """How samples are made: the model's settings, changed by what config.eval gives."""
    given = {
        "sampler": config.eval.get("sampler"),
        "num_inference_steps": config.eval.get("num_steps"),
        "guidance_scale": config.eval.get("guidance_scale"),
    }
    return dataclasses.replace(
        pipeline.generation, **{name: value for name, value in given.items() if value is not None}
    )


class SampleEvaluator:
    """Samples held-out prompts from the same noise every time, scores the images and watches what else they do.

    Calling it with the components gives `eval/reward_mean`, `eval/reward_std` (over prompts, of each prompt's mean; an
    image without a verdict counts in neither), the `eval/reward_NAME` of `Terms.metrics`, of each of config.eval.judges
    `eval/judge_NAME`, and, if the prompts are the shapes world's, `eval/checker_rate`, the share of images in which the
    rule-based checker finds all four words. `eval/diversity` is the mean distance between images of a prompt, and the
    embeddings it is measured in are given for `eval/drift`: see `judges`. For each S of config.eval.guidance_scales the
    same prompts and noise give `eval/reward_mean@S` and `eval/checker_rate@S`.

    Args:
        parts: the run's parts; reads config.eval, the pipeline, the reward's terms and the judges' (or None).
        size: (height, width) in pixels.
    """

    def __init__(self, parts: Any, size: tuple[int, int]):
        self.settings, self.pipeline, self.mesh = parts.config.eval, parts.pipeline, parts.mesh
        embedder = next((one for one in (parts.judges, parts.terms) if one and one.embedder is not None), None)

        def scorer(terms):
            return terms and BatchScorer(terms, self.mesh, self.settings.batch_size, embeds=terms is embedder)

        self.rewards, self.judges = scorer(parts.terms), scorer(parts.judges)
        self.embeds = embedder is not None
        for terms in (parts.judges, parts.terms):
            if terms is not None:
                terms.check_traced(*size)
        rows = held_out_rows(parts)
        chosen = np.repeat(np.arange(len(rows))[: self.settings.num_prompts], self.settings.images_per_prompt)
        self.prompts = [rows[row]["prompt"] for row in chosen]
        self.metadata = [rows[row]["metadata"] for row in chosen]
        self.count = parts.config.steps // self.settings.every + 1  # evaluations of the run
        self.check = str(self.settings.prompts).startswith("shapes:")
        generation = parts.generation
        sampler = self.pipeline.make_sampler(
            generation.sampler, generation.num_inference_steps, self.settings.eta, *size
        )
        self.sample = ImageSampler(
            self.pipeline,
            sampler,
            self.mesh,
            self.settings.batch_size,
            height=size[0],
            width=size[1],
            guidance_scale=generation.guidance_scale,
            encode=encoded.prompt_reader(parts, self.prompts) if parts.config.data.get("cache") else None,
        )

    @property
    def measures(self) -> list[str]:
        """Names of the metrics; with * those that functions name when they are called."""
        found, ending = [], "" if self.embeds else "_pixels"
        if self.rewards:
            terms = self.rewards.terms
            found += ["eval/reward_mean", "eval/reward_std", *(f"eval/reward_{name}" for name in terms.terms if name)]
            found += [f"eval/reward_{NO_VERDICT}", "eval/reward_*"] if terms.functions else []
        found += ["eval/checker_rate"] if self.check else []
        if self.judges:
            found += [f"eval/judge_{name}" for name in self.judges.terms.terms]
            found += [f"eval/judge_{name}.*" for name in self.judges.terms.functions]
        found += [f"{name}@{scale:g}" for scale in self.settings.guidance_scales for name in COMPARED if name in found]
        found += [f"eval/diversity{ending}"] if self.settings.images_per_prompt > 1 else []
        return [*found, f"eval/drift{ending}"]

    def __call__(self, components: Params) -> Evaluation:
        """See the class."""
        seed = jax.random.key(self.settings.seed)
        keys = jax.vmap(lambda index: jax.random.fold_in(seed, index))(np.arange(len(self.prompts)))
        with tqdm(
            total=len(self.prompts) * (1 + len(self.settings.guidance_scales)),
            unit="image",
            desc="evaluating",
            leave=False,
            delay=1.0,
            disable=jax.process_index() != 0,
            file=sys.stderr,
        ) as bar:
            return self._evaluate(components, keys, foretelling(bar.update, bar.total, self._advise))

    def _advise(self, images, seconds):
        """Says once, in process 0, how long the evaluations take."""
        if self.count and not jax.process_index():
            tqdm.write(
                f"warning: sampling the {images:,} images of an evaluation takes about {seconds / 60:.0f} "
                f"minutes, and this run has {self.count} of them: config.eval.num_prompts and config.eval.every change "
                "that",
                file=sys.stderr,
            )
        self.count = 0

    def _evaluate(self, components, keys, progress):
        images = self.sample(components, self.prompts, keys=keys, progress=progress)
        pixels = to_uint8(images)
        scores, more, embeds = self._scores(components, images, pixels)
        captions = self._captions(scores)
        if self.judges:
            params = self.judges.place_params()  # for as long as they score: between evaluations the host holds them
            judged, own = self.judges(params, images, pixels, self.prompts, self.metadata)
            del params
            scores |= {f"eval/judge_{name}": values for name, values in judged.items()}
            embeds = embeds if own is None else own
        metrics, errors = self._means(scores)
        metrics |= more
        each = self.settings.images_per_prompt
        by_prompt = {name: np.reshape(values, (-1, each)) for name, values in scores.items()}
        ending, embeds = ("", embeds) if self.embeds else ("_pixels", embed_pixels(pixels))
        if each > 1:
            by_prompt[f"eval/diversity{ending}"] = diversity = distance_within(embeds, each)
            metrics[f"eval/diversity{ending}"] = diversity.mean()
            errors[f"eval/diversity{ending}"] = diversity.std() / len(diversity) ** 0.5
        for scale in self.settings.guidance_scales:
            others = self.sample(components, self.prompts, keys=keys, guidance_scale=scale, progress=progress)
            found, _ = self._means(self._scores(components, others, to_uint8(others))[0])
            metrics |= {f"{name}@{scale:g}": found[name] for name in COMPARED if name in found}
        shown, rewards = self.settings.grid, scores.get("eval/reward_mean")
        return Evaluation(
            {name: float(value) for name, value in metrics.items()},
            contact_sheet(images[:shown], captions[:shown]),
            ImageSamples(images, list(self.prompts), list(self.metadata), rewards, held_out=True),
            {name: float(value) for name, value in errors.items()},
            {f"eval/drift{ending}": embeds},
            by_prompt,
        )

    def _scores(self, components, images, pixels):
        """({metric: its value of each image}, further metrics, embeddings or None) by the reward and the checker."""
        scores, more, embeds = {}, {}, None
        if self.rewards:
            curves, embeds = self.rewards(components.get("reward", {}), images, pixels, self.prompts, self.metadata)
            scores["eval/reward_mean"] = rewards = self.rewards.terms.total(curves)
            more = {f"eval/{name}": value for name, value in self.rewards.terms.metrics(curves, rewards).items()}
        if self.check:
            scores["eval/checker_rate"] = [fully_right(prompt, image) for prompt, image in zip(self.prompts, pixels)]
        return scores, more, embeds

    def _means(self, scores):
        """(metrics, the standard error of each over prompts)"""
        metrics, errors = {}, {}
        for name, values in scores.items():
            per_prompt = over_prompts(values, self.settings.images_per_prompt)
            if not len(per_prompt):  # a part of a judge's scores
                continue
            metrics[name], errors[name] = per_prompt.mean(), per_prompt.std() / len(per_prompt) ** 0.5
            if name == "eval/reward_mean":
                metrics["eval/reward_std"] = per_prompt.std()
        return metrics, errors

    def _captions(self, scores):
        captions = self.prompts
        if "eval/reward_mean" in scores:
            captions = [f"{reward:+.2f} {prompt}" for prompt, reward in zip(captions, scores["eval/reward_mean"])]
        if "eval/checker_rate" in scores:
            right = ["(right)" if ok else "(wrong)" for ok in scores["eval/checker_rate"]]
            captions = [f"{caption} {word}" for caption, word in zip(captions, right)]
        return captions


class ReconstructionEvaluator:
    """Peak signal-to-noise ratio in dB of reconstructed images, `eval/psnr`; the sheet shows each beside its original.

    Args:
        parts: the run's parts.
    """

    measures = ("eval/psnr",)

    def __init__(self, parts: Any):
        self.pipeline, self.mesh = parts.pipeline, parts.mesh
        self.images = self._held_out(parts)
        self._reconstruct = jax.jit(self._reconstructed, out_shardings=replicated(self.mesh))
        self._moments = jax.jit(self.pipeline.encode_moments, out_shardings=replicated(self.mesh))

    def _held_out(self, parts):
        config = parts.config.copy_and_resolve_references()
        config.seed, config.batch_size = config.seed + 1, config.eval.num_images * jax.process_count()
        config.data.workers = 0
        images = next(iterate(config, load_pairs_of(config)))["image"]
        return images[: len(images) // self.mesh.size * self.mesh.size]

    def _reconstructed(self, components, images):
        mean, _ = self.pipeline.encode_moments(components, images)
        return jnp.clip(self.pipeline.decode(components, self.pipeline.scale_latents(mean)), 0, 1)

    def __call__(self, components: Params) -> Evaluation:
        """See the class."""
        images = put_replicated_rows(self.mesh, self.images)
        outputs = np.asarray(self._reconstruct(components, images))
        psnr = -10 * np.log10(np.mean(np.square(outputs - self.images)))
        pairs = np.stack([self.images, outputs], axis=1).reshape(-1, *outputs.shape[1:])[:32]
        return Evaluation({"eval/psnr": float(psnr)}, contact_sheet(pairs, [""] * len(pairs), columns=8))

    def scaling_factor(self, components: Params) -> float:
        """What brings the latents of the held-out images to unit variance."""
        mean, logvar = self._moments(components, put_replicated_rows(self.mesh, self.images))
        return float(1 / np.sqrt(np.mean(np.square(mean - mean.mean())) + np.mean(np.exp(logvar))))


def export_autoencoder(parts: Any, evaluator: ReconstructionEvaluator) -> Export:
    """See `Parts.export_autoencoder`."""

    def write(components: Params, scale: float, folder: Path) -> None:
        parts.save_pipeline(folder, components, generation=parts.pipeline.generation)
        path = folder / "vae" / "config.json"
        write_text(path, json.dumps({**json.loads(path.read_text()), "scaling_factor": round(scale, 5)}, indent=2))

    return Export(write, INDEX, ("vae",), evaluator.scaling_factor)


class RankingEvaluator:
    """`eval/accuracy` (share of pairs ordered as people did; ties are wrong) and `eval/loss` over ranked groups.

    Args:
        scorer: an `assembly.rewards.TrainedScorer`.
        groups: random access to groups; the first `count` are read at each evaluation, a batch at a time.
    """

    measures = ("eval/accuracy", "eval/loss")
    batch = 64
    shown = 6
    remembered = 2**28  # bytes of images that are kept from one evaluation to the next

    def __init__(self, scorer: Any, groups: Any, mesh: Mesh, count: int):
        self.reward, self.groups, self.mesh = scorer.reward, groups, mesh
        self.count, self.columns = min(count, len(groups)), groups.largest
        if self.count * groups.largest * scorer.image_size**2 * 12 <= self.remembered:
            self.groups = [groups[index] for index in range(self.count)]
        self._score = jax.jit(self.reward.apply, out_shardings=replicated(mesh))

    def scores(self, params: Params) -> np.ndarray:
        """[N] the score of every image; params: the reward's parameters, on the mesh."""
        return np.concatenate([scores for _, scores in self._scored(params)])

    def _scored(self, params):
        """(group, its scores) for every group."""
        waiting, images = [], 0
        for index in range(self.count):
            waiting.append(self.groups[index])
            images += len(waiting[-1]["ranking"])
            if images >= self.batch or index == self.count - 1:
                yield from self._score_groups(params, waiting)
                waiting, images = [], 0

    def _score_groups(self, params, groups):
        images = np.concatenate([group["images"] for group in groups])
        tokens = self.reward.tokenize([group["prompt"] for group in groups for _ in group["ranking"]])
        batch = -(-self.batch // self.mesh.size) * self.mesh.size
        scores = []
        for start in range(0, len(images), batch):
            rows = np.minimum(np.arange(start, start + batch), len(images) - 1)
            part = {"images": images[rows], "tokens": {name: ids[rows] for name, ids in tokens.items()}}
            part = put_replicated_rows(self.mesh, part)
            scores.append(np.asarray(self._score(params, part["images"], part["tokens"])))
        scores = np.concatenate(scores)[: len(images)]
        ends = np.cumsum([len(group["ranking"]) for group in groups])
        return zip(groups, np.split(scores, ends[:-1]))

    def __call__(self, components: Params) -> Evaluation:
        """See the class."""
        losses, correct, images, captions = [], [], [], []
        for group, scores in self._scored(components["reward"]):
            loss, right, pairs = (np.asarray(x) for x in pair_losses(scores, group["ranking"]))
            losses.append(loss[pairs])
            correct.append(right[pairs])
            if len(losses) <= self.shown:
                images += list(padded(group, self.columns)["images"])
                captions += [f"{score:+.2f} {group['prompt']}" for score in scores]
                captions += [""] * (self.columns - len(scores))
        metrics = {
            "eval/accuracy": float(np.concatenate(correct).mean()),
            "eval/loss": float(np.concatenate(losses).mean()),
        }
        return Evaluation(metrics, contact_sheet(np.stack(images), captions, columns=self.columns))


def export_scorer(scorer: Any, evaluator: RankingEvaluator) -> Export:
    """See `Parts.export_scorer`."""
    config, tokenizer = scorer.reward.config, scorer.reward.tokenizer

    def measure(components: Params) -> tuple[float, float]:
        scores = evaluator.scores(components["reward"])
        return float(scores.mean()), float(scores.std())

    def write(components: Params, measured: tuple[float, float], folder: Path) -> None:
        mean, std = measured
        settings = dataclasses.replace(
            config, score_mean=config.score_mean + config.score_std * mean, score_std=config.score_std * std
        )
        ImageReward(settings, components["reward"], tokenizer).save(folder)

    return Export(write, CONFIG_FILE, ("reward",), measure)
