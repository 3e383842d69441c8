"""The one table of what metrics are, from their names in metrics.jsonl to words."""

from typing import NamedTuple


class Words(NamedTuple):
    """A metric's name and what it is; `meaning` is "" if only its author knows."""

    title: str
    meaning: str


EVALUATION = {
    "reward_mean": ("Reward", "mean score of held-out images by the reward that trains"),
    "reward_std": ("Reward, spread", "standard deviation of the reward over prompts"),
    "checker_rate": ("Images fully right", "share in which a rule-based checker finds all the prompt's words"),
    "diversity": ("Diversity", "mean distance between images of a prompt; near 0 all are one image"),
    "diversity_pixels": ("Diversity", "mean distance between images of a prompt, by colours; near 0 all are one image"),
    "reward_no_verdict": ("No verdict", "number of images without a score"),
    "drift": ("Drift", "mean distance from the images of before the first step"),
    "drift_pixels": ("Drift", "mean distance from the images of before the first step, by colours"),
    "accuracy": ("Accuracy", "share of held-out pairs that are ordered as their ranking is"),
    "loss": ("Loss", "loss on held-out data"),
    "psnr": ("PSNR", "of reconstructed held-out images, in dB; higher is closer"),
}
# By the last part of a name, whatever the phase.
TRAINING = {
    "reward": ("Reward", "mean score of the images that train"),
    "reward_std": ("Reward, spread", "standard deviation of the reward over the images of a batch"),
    "reward_no_verdict": ("No verdict", "number of images without a score"),
    "loss": ("Loss", "the value that training lowers"),
    "grad_norm": ("Gradient norm", "before it is clipped"),
    "mse": ("Denoising error", "squared error of the prediction, unweighted"),
    "class_mse": ("Denoising error, class images", "squared error on images of the class, unweighted"),
    "stop": ("Stopping step", "mean number of denoising steps after which images are scored"),
    "leap_error": ("Leap error", "of predicting the image in one leap, beside taking all steps"),
    "leap_weight": ("Leap weight", "weight that leaps have in the loss"),
    "base_deviation": ("Deviation from the base", "squared distance of predictions from the base model's"),
    "old_deviation": ("Deviation from the old policy", "squared distance of predictions from the sampling policy's"),
    "approx_kl": ("Policy change", "estimated KL divergence of the updated from the sampling policy"),
    "clipfrac": ("Clipped", "share of samples whose probability ratio was clipped"),
    "ratio_error": ("Ratio error", "largest distance of the ratio from 1 before the first update; should be rounding"),
    "penalty": ("Penalty", "weighted divergence from the base model, a part of the loss"),
    "policy": ("Policy loss", "the loss without its penalty"),
    "accuracy": ("Accuracy", "share of pairs of the batch that are ordered as their ranking is"),
    "score_std": ("Score, spread", "standard deviation of the scores of a batch"),
    "psnr": ("PSNR", "of reconstructed images, in dB; higher is closer"),
    "kl": ("KL divergence", "of the latents from a normal distribution"),
    "latent_std": ("Latents, spread", "standard deviation of the latents"),
    "images_per_second": ("Speed", "images per second of training"),
    "learning_rate": ("Learning rate", "of the last update"),
    "skipped": ("Skipped updates", "so far, because loss or gradient was not finite"),
    "images": ("Images", "trained on so far"),
}


def words(name: str) -> Words:
    """A metric in words: "eval/judge_pick", "refl/stop", "eval/checker_rate@5"."""
    name, _, scale = name.partition("@")
    room, _, leaf = name.rpartition("/")
    found = (EVALUATION if room in ("eval", "test") else TRAINING).get(leaf)
    if found is None and leaf.startswith("judge_"):
        found = (f"Judge: {leaf.removeprefix('judge_')}", "mean score by a reward that does not train")
    if found is None and leaf.startswith("reward_"):
        found = (f"Reward: {leaf.removeprefix('reward_')}", "one of the scores that the reward is made of")
    if found is None and leaf.endswith("_loss"):
        found = (f"Loss: {leaf.removesuffix('_loss')}", "one of the losses that are summed")
    title, meaning = found or (leaf, "")
    return Words(f"{title} at guidance {scale}" if scale else title, meaning)
