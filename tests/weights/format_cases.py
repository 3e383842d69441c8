"""Tiny random models, adapters and embeddings in every format of docs/files.md, for formats_in_diffusers.py."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import adapter_files
import convert_scripts
import flax_files
import numpy as np
import single_files
import tiny_sd1
import tiny_sd3
import tiny_sdxl

from imagereward_jax.models.lora import CLIP_ATTENTION
from imagereward_jax.pipelines import load_pipeline, open_pipeline
from imagereward_jax.pipelines.embeddings import with_embeddings
from imagereward_jax.weights import adapters
from imagereward_jax.weights.embeddings import read_embedding
from imagereward_jax.weights.files import read_tensors, write_safetensors

RANK, ALPHA = 4, 2.0
ATTENTION = {"unet": r"to_q|to_k|to_v|to_out\.0"}
CONVOLUTIONS = {"unet": rf"{ATTENTION['unet']}|proj_in|resnets\.\d+\.conv1"}
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LAYERS, CONVOLUTION = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_v"], "mid_block.resnets.0.conv1"
PROMPT, WORD_PROMPT = "a small blue cross in the center", "a <cat-toy> cross in the style of <cat-toy>"
NEW, OLD, BOTH, NONE = ("new",), ("old",), ("new", "old"), ()
Job = dict[str, Any]
Opened = tuple[Any, Any]


class Case(NamedTuple):
    """A model, or a model with an adapter or embedding, in one format.

    Attributes:
        name: of the format. family: of the model.
        job: how diffusers opens it (diffusers_reader.py).
        open: () -> (pipeline, params) by this package. prompt: of the image.
        readers: the versions of diffusers, "new" and "old", that open it.
        reference: for the others the same numbers in a format that they open.
        export: (folder) -> (job, whether a round trip is equal to the bit, None if there is none); None for no export.
        apart: the image has to differ from that of the model alone.
    """

    name: str
    family: str
    job: Job
    open: Callable[[], Opened]
    prompt: str = PROMPT
    readers: tuple[str, ...] = BOTH
    reference: Job | None = None
    export: Callable[[Path], tuple[Job, bool | None]] | None = None
    apart: bool = False


def cases(place: Path) -> Iterator[Case]:
    """Writes every model, adapter and embedding into a folder."""
    for part in (folders, single, sd1_adapters, lycoris_adapters, sdxl_adapters, sd3_adapters, embeddings):
        yield from part(place)


# Models


def folders(place: Path) -> Iterator[Case]:
    """A diffusers folder of Stable Diffusion 1 with every kind of weight files, and the folder of Orbax."""
    import diffusers
    import torch

    base = tiny_sd1.save_one_level(place)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    networks = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder")}

    def copy(name, write):
        folder = shutil.copytree(base, place / name)
        for part, network in networks.items():
            for weights in (folder / part).glob("*.safetensors"):
                weights.unlink()
            write(folder / part, network)
        return folder

    def shards(folder, network):
        network.save_pretrained(folder, max_shard_size="20KB")

    def pickles(folder, network):
        if folder.name == "text_encoder":
            tensors = {f"text_model.{key.removeprefix('text_model.')}": a for key, a in network.state_dict().items()}
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            network.save_pretrained(folder, safe_serialization=False)

    def half(folder, network):
        type(network).from_pretrained(base / folder.name).half().save_pretrained(folder, variant="fp16")

    for name, folder, more, readers in (
        ("safetensors", base, {}, BOTH),
        ("shards", copy("shards", shards), {}, NEW),
        (".bin", copy("bin", pickles), {}, BOTH),
        ("variant fp16", copy("fp16", half), {"variant": "fp16"}, BOTH),
        ("Flax's msgpack", copy("flax", flax_files.write), {"flax": str(base)}, OLD),
    ):
        options = {"variant": more["variant"]} if "variant" in more else {}
        readers = {"readers": readers, "reference": None if readers is BOTH else {"model": str(base)}}
        open_it = _loader(folder, **options)
        export = _saved(open_it, open_pipeline(folder, **options))
        yield Case(f"folder, {name}", "SD 1", {"model": str(folder), **more}, open_it, export=export, **readers)
    convert_scripts.run("from_diffusers", base, place / "orbax")

    def back(folder):
        convert_scripts.run("to_diffusers", place / "orbax", folder)
        return {"model": str(folder)}, _same_networks(open_pipeline(base), open_pipeline(folder))

    yield Case(
        "folder of convert/from_diffusers.py", "SD 1", {"model": str(place / "orbax")}, _loader(place / "orbax"),
        readers=NONE, reference={"model": str(base)}, export=back,
    )  # fmt: skip


def single(place: Path) -> Iterator[Case]:
    """A single file of each family, as .safetensors and as .ckpt."""
    import torch

    for kind, family in (("sd1", "SD 1"), ("sd2", "SD 2"), ("sdxl", "SDXL"), ("sd3", "SD 3")):
        root = place / f"single_{kind}"
        pipeline, params = single_files.make(kind, root / "tokenizer")
        pipeline.save(root / "folder", params)
        path = root / "model.safetensors"
        convert_scripts.run("single_file", root / "folder", path)
        tensors = {key: np.array(array) for key, array in read_tensors(path).items()}
        if kind == "sd2":  # as published files have it; diffusers reads the width there
            width = pipeline.configs["text_encoder"].hidden_size
            tensors[UNUSED] = np.zeros((width, width), np.float32)
            write_safetensors(path, tensors)
        state = {key: torch.from_numpy(array) for key, array in tensors.items()}
        torch.save({"state_dict": state, "global_step": 7}, path.with_suffix(".ckpt"))
        tokenizers = (f"{folder}={root / 'tokenizer'}" for folder in pipeline.text_encoders.values())
        predicts = {"prediction_type": "v_prediction"} if kind == "sd2" else {}
        options, readers = {"parts": ",".join(tokenizers), **predicts}, NEW if kind == "sd3" else BOTH
        for file in (path, path.with_suffix(".ckpt")):
            yield Case(
                f"single file, {file.suffix}", family, {"model": str(root / "folder"), "file": str(file), **predicts},
                _loader(file, **options), readers=readers, export=_converted(file, options),
            )  # fmt: skip


UNUSED = "cond_stage_model.model.text_projection"  # which a folder of Stable Diffusion 2 does not have


def _loader(path, **options):
    """`Case.open` of a model."""
    return lambda: load_pipeline(path, **options)


def _saved(open_it, before=None):
    """`Case.export` of a model: a folder of its parameters, and whether they are those of the pipeline `before`."""

    def export(folder):
        pipeline, params = open_it()
        pipeline.save(folder, params)
        return {"model": str(folder)}, before and _same_networks(before, open_pipeline(folder))

    return export


def _converted(path, options):
    """`Case.export` of a single file: the folder of convert/single_file.py, which is converted back."""

    def export(folder):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        convert_scripts.run("single_file", path, folder, *flags)
        convert_scripts.run("single_file", folder, f"{folder}.safetensors")
        before, after = read_tensors(path), read_tensors(f"{folder}.safetensors")
        before.pop(UNUSED, None)
        return {"model": str(folder)}, _same(before, after)

    return export


def _same_networks(*pipelines):
    return all(
        _same(*(pipeline.source.tensors(name, pipeline.networks[name]) for pipeline in pipelines))
        for name in pipelines[0].networks
    )


def _same(*files):
    """Whether tensors are the same numbers, to the bit of float32."""
    before, after = (
        {key: np.asarray(array[...], np.float32).tobytes() for key, array in tensors.items()} for tensors in files
    )
    return before == after


# Adapters


def sd1_adapters(place: Path) -> Iterator[Case]:
    """Plain LoRA of Stable Diffusion 1, in the names of each program."""
    base, place = place / "model", place / "adapters"
    pipeline = open_pipeline(base)
    both = ATTENTION | {"text_encoder": CLIP_ATTENTION}
    attention, convolutions, with_encoder = (
        adapter_files.exported(place / str(number), pipeline, targets, rank=RANK, alpha=ALPHA)
        for number, targets in enumerate((ATTENTION, CONVOLUTIONS, both))
    )
    with_text = attention | adapter_files.random_text_layers()
    for name, tensors in {
        "PEFT's names (this package, diffusers)": convolutions,
        "PEFT's names, text encoder too": with_encoder,
        "diffusers before 2024": adapter_files.of_2024(convolutions),
        "attention processors of 2023": adapter_files.of_2023(adapter_files.of_2024(attention)),
        "kohya, alpha": adapter_files.kohya(with_text, ALPHA / RANK),
        "kohya, no alpha": adapter_files.kohya(with_text, None),
        "kohya, convolutions": adapter_files.kohya(convolutions, ALPHA / RANK),
    }.items():
        yield _plain(name, "SD 1", base, _written(place, name, tensors))
    tensors = {key.replace("unet.", "base_model.model."): array for key, array in attention.items()}
    layers = sorted({key.removeprefix("unet.").rsplit(".lora_", 1)[0] for key in attention})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": layers}
    folder = adapter_files.peft_folder(place / "peft", tensors, **settings)
    yield _plain("PEFT's folder, adapter_config.json", "SD 1", base, folder, {"peft": str(folder)})


def lycoris_adapters(place: Path) -> Iterator[Case]:
    """LyCORIS and DoRA of Stable Diffusion 1; PEFT's layers, or PyTorch's sum of weights, are the reference."""
    import diffusers
    import peft
    import torch

    base, place = place / "model", place / "lycoris"
    place.mkdir()
    both = [*LAYERS, CONVOLUTION]
    for name, kind, settings in (
        ("LoHa", peft.LoHaConfig, {"peft_type": "LOHA", "r": RANK, "alpha": ALPHA, "target_modules": both}),
        # Of rank 1 and alpha 1, because PEFT 0.10 leaves out its scale.
        ("LoKr", peft.LoKrConfig, {"peft_type": "LOKR", "r": 1, "alpha": 1, "target_modules": both}),
        (
            "DoRA",
            peft.LoraConfig,
            {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": LAYERS, "use_dora": True},
        ),
    ):
        unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
        arguments = {key: value for key, value in settings.items() if key != "peft_type"}
        tensors = adapter_files.randomised(peft.get_peft_model(unet, kind(**arguments)))
        folder = adapter_files.peft_folder(place / f"peft_{name}", tensors, **settings)
        path = _written(place, name, adapter_files.lycoris(tensors, settings.get("alpha", ALPHA)))
        yield _merged(name, "SD 1", base, path, {"model": str(base), "peft": str(folder)})
    rng, random = np.random.default_rng(0), adapter_files.random
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    layer, stem = pipe.unet.get_submodule(CONVOLUTION), f"lora_unet_{CONVOLUTION.replace('.', '_')}"
    out, features, *space = layer.weight.shape
    down, up = random(rng, RANK, features, 1, 1), random(rng, out, RANK, 1, 1)
    core, weight = random(rng, RANK, RANK, *space), layer.weight.data.clone()
    tucker = torch.einsum("abhw,oa,bi->oihw", *map(torch.from_numpy, (core, up[..., 0, 0], down[..., 0, 0])))
    halves = {"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up, "alpha": np.float32(ALPHA)}
    for name, delta, tensors in (
        ("LoRA with Tucker's core", tucker * ALPHA / RANK, halves),
        ("full difference", tucker, {"diff": tucker.numpy()}),
    ):
        layer.weight.data = weight + delta
        pipe.unet.save_pretrained(shutil.copytree(base, place / f"merged {name}") / "unet")
        path = _written(place, name, {f"{stem}.{key}": array for key, array in tensors.items()})
        yield _merged(name, "SD 1", base, path, {"model": str(place / f"merged {name}")})


def sdxl_adapters(place: Path) -> Iterator[Case]:
    """kohya's file of SDXL, with Stability's numbers of blocks and layers of both text encoders."""
    place = place / "sdxl"
    pipeline, params = tiny_sdxl.make(place / "tokenizers")
    pipeline.save(place / "model", params)
    path = _written(place, "kohya", adapter_files.kohya_of_sdxl(pipeline))
    yield _merged("kohya", "SDXL", place / "model", path)


def sd3_adapters(place: Path) -> Iterator[Case]:
    """LoRA of Stable Diffusion 3; diffusers reads PEFT's names alone."""
    place = place / "sd3"
    base = place / "model"
    tiny_sd3.make(place / "tokenizers", with_t5=False).save_pretrained(base)
    pipeline = open_pipeline(base)
    tensors = adapter_files.exported(
        place / "own", pipeline, {"transformer": pipeline.lora_targets}, rank=RANK, alpha=ALPHA
    )
    own = place / "own" / adapters.FILE
    yield _plain("PEFT's names (this package, diffusers)", "SD 3", base, own, readers=NEW)
    reference = {"model": str(base), "lora": str(own)}
    for name, form in adapter_files.forms_of_sd3(tensors).items():
        path = _written(place, name, form)
        if name == "OneTrainer":  # each layer by itself, of one rank
            yield _plain(name, "SD 3", base, path, readers=NONE, reference=reference)
        else:
            yield _merged(name, "SD 3", base, path, reference)


def _written(place, name, tensors):
    path = place / f"{name}.safetensors".replace("/", " ")
    write_safetensors(path, tensors)
    return path


def _adapted(base, path):
    """`Case.open` of a model with an adapter."""

    def open_it():
        pipeline, params = load_pipeline(base)
        return pipeline, adapters.merge(pipeline.networks, params, adapters.read_adapter(path, pipeline.networks))

    return open_it


def _plain(name, family, base, path, job=None, **fields):
    """Plain LoRA, which training continues from; its export is what a run of no steps would write."""

    def export(folder):
        pipeline = open_pipeline(base)
        read, own = adapters.read_adapter(path, pipeline.networks), {}
        for network, layers in read.items():
            update = next(iter(layers.values()))
            options = {"rank": update.rank, "alpha": update.scale * update.rank}
            pipeline = pipeline.with_lora(network, "|".join(map(re.escape, layers)), **options)
            own[network] = adapters.low_rank_params(pipeline.networks[network], layers, what=str(path), **options)
        folder.mkdir()
        adapters.write_adapter(folder, pipeline.networks, own, **options)
        again = adapters.read_adapter(folder, pipeline.networks)
        exact = all(_same(_pairs(layers), _pairs(again[network])) for network, layers in read.items())
        return {"model": str(base), "lora": str(folder / adapters.FILE)}, exact

    job = {"model": str(base), **(job or {"lora": str(path)})}
    return Case(name, family, job, _adapted(base, path), export=export, apart=True, **fields)


def _pairs(layers):
    """Both factors of each layer, with its scale in the second."""
    return {
        (name, half): array
        for name, update in layers.items()
        for half, array in (("down", update.down), ("up", update.up * np.float32(update.scale)))
    }


def _merged(name, family, base, path, reference=None):
    """An adapter that is merged only; its export is the merged model."""
    readers = {"readers": NONE, "reference": reference} if reference else {}
    open_it = _adapted(base, path)
    return Case(
        name, family, {"model": str(base), "lora": str(path)}, open_it, export=_saved(open_it), apart=True, **readers
    )


# Embeddings


def embeddings(place: Path) -> Iterator[Case]:
    """Textual inversion, of three vectors for each text encoder."""
    import torch

    sd1, sdxl, place = place / "model", place / "sdxl" / "model", place / "embeddings"
    place.mkdir()
    rng = np.random.default_rng(0)
    first, second = (adapter_files.random(rng, 3, width) for width in (24, 32))
    tensor = torch.from_numpy(first)
    paths = [place / "learned_embeds.safetensors", place / "learned_embeds.bin", place / "web_ui.pt"]
    write_safetensors(paths[0], {"<cat-toy>": first})
    torch.save({"<cat-toy>": tensor}, paths[1])
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": "<cat-toy>"}, paths[2])
    for name, path in zip(("diffusers, .safetensors", "diffusers, .bin", "web UI, .pt"), paths):
        yield _embedded(name, "SD 1", sd1, [(path, "")])
    write_safetensors(place / "second.safetensors", {"<cat-toy>": second})
    files = [(paths[0], ""), (place / "second.safetensors", "_2")]
    yield _embedded("diffusers, two files", "SDXL", sdxl, files)
    write_safetensors(place / "both.safetensors", {"clip_l": first, "clip_g": second})
    reference = {"model": str(sdxl), "embeddings": [[str(path), suffix] for path, suffix in files]}
    both = [(place / "both.safetensors", "")]
    yield _embedded("clip_l and clip_g", "SDXL", sdxl, both, readers=NONE, reference=reference)


def _embedded(name, family, base, files, **fields):
    def open_it():
        words = [read_embedding(path, "<cat-toy>") for path, _ in files]
        pipeline = with_embeddings(open_pipeline(base), words)
        return pipeline, pipeline.load_params()

    job = {"model": str(base), "embeddings": [[str(path), suffix] for path, suffix in files]}
    return Case(f"embedding of {name}", family, job, open_it, prompt=WORD_PROMPT, apart=True, **fields)
