"""CLIP, BLIP, Aesthetic, PickScore and HPSv2.1: read from their published layouts, equal to PyTorch within 1e-4."""

import functools
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
import torch_blip
import torch_clip
from PIL import Image

import imagereward_jax
from imagereward_jax import score
from imagereward_jax.data.shapes import write_clip_tokenizer
from imagereward_jax.models.blip import BlipScoreModel
from imagereward_jax.models.blip_config import BlipScoreConfig
from imagereward_jax.models.clip_score import AestheticModel, CLIPScoreModel
from imagereward_jax.rewards import clip_checkpoint, preprocess, scores
from imagereward_jax.rewards.tokens import CLIPPromptTokenizer, PromptTokenizer
from imagereward_jax.weights import clip_layouts, files, hub, mapping

REAL = Path(__file__).parents[3] / "shared" / "real"
HEAD = REAL / "sac+logos+ava1-l14-linearMSE.pth"
BPE = REAL / "clip-bpe" / "bpe_simple_vocab_16e6.txt.gz"
PROMPTS = ["a small red circle at the top left", "A large BLUE square at the bottom right!", "a green triangle", ""]
LENGTH = 16
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and deviation of pixels of LAION's L/14
VIT_L = ((224, 14, 1024, 16, 24), (49408, 77, 768, 12, 12), 768, torch_clip.QuickGELU)
VIT_H = ((224, 14, 1280, 16, 32), (49408, 77, 1024, 16, 24), 1024, torch.nn.GELU)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip-vocabulary")
    size = write_clip_tokenizer(folder)
    return folder, size


@pytest.fixture(scope="module")
def images():
    """Four images as uint8 [40, 56, 3], of 28 pixels once resized and cropped."""
    coarse = (np.random.default_rng(1).random((4, 4, 5, 3)) * 255).astype(np.uint8)
    return [Image.fromarray(image).resize((56, 40), Image.Resampling.BICUBIC) for image in coarse]


def small_clip(vocab_size, vision_head, activation, seed):
    """OpenAI's layout with two heads in each tower, and norms that are not the identity."""
    torch.manual_seed(seed)
    text = (vocab_size, LENGTH, 128, 2, 2)
    model = torch_clip.CLIP((28, 14, 2 * vision_head, 2, 2), text, 24, activation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name != "visual.class_embedding":
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


def torch_pixels(images, preprocess=preprocess.CROP):
    pixels = np.stack([preprocess.host(image, 28, "image") for image in images])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def torch_ids(folder, prompts=PROMPTS):
    """Ids as OpenAI pads them: with zeros after the end of the text."""
    ids = CLIPPromptTokenizer(folder, LENGTH)(prompts)["input_ids"].astype(np.int64)
    past = np.arange(LENGTH) > (ids == ids.max()).argmax(1)[:, None]
    return torch.from_numpy(np.where(past, 0, ids))


@pytest.fixture(scope="module")
def openai(vocab, tmp_path_factory):
    """(reference, file): a CLIP as OpenAI publishes it, a TorchScript archive."""
    model = small_clip(vocab[1], 64, torch_clip.QuickGELU, 0)
    path = tmp_path_factory.mktemp("openai") / "ViT-L-14.pt"
    example = (torch.zeros(1, 3, 28, 28), torch.zeros(1, LENGTH, dtype=torch.long))
    for name in ("input_resolution", "context_length", "vocab_size"):  # by which OpenAI's archives are known
        model.register_buffer(name, torch.tensor(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of the format's age and of the tracer's limits
        torch.jit.trace(model, example, check_trace=False).save(str(path))
    return model, path


def save_head(path):
    """Aesthetic's head, over 24 numbers of a CLIP."""
    torch.manual_seed(2)
    head = torch_blip.Head(24, (1024, 128, 64, 16))
    torch.save(head.state_dict(), path)
    return head


def save_openclip(path, vocab_size):
    """A CLIP in the layout of ViT-H/14, in small, with its open_clip_config.json."""
    model = small_clip(vocab_size, 80, torch.nn.GELU, 3)
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, path)
    towers = {"vision_cfg": {"width": 160, "layers": 2, "head_width": 80}, "text_cfg": {"width": 128, "layers": 2}}
    towers["text_cfg"]["heads"] = 2
    config = {"model_cfg": towers, "preprocess_cfg": dict(zip(("mean", "std"), HALVES))}
    (path.parent / clip_checkpoint.OPEN_CLIP_CONFIG).write_text(json.dumps(config))
    return model


def save_transformers(folder, vocab, **options):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": vocab[1], "max_position_embeddings": LENGTH, "eos_token_id": vocab[1] - 1}
    vision = {**sizes, "image_size": 28, "patch_size": 14, "hidden_act": "gelu"}
    model = CLIPModel(CLIPConfig(text_config={**text, "hidden_act": "gelu"}, vision_config=vision, projection_dim=24))
    model.eval().save_pretrained(folder, **options)
    copy_vocabulary(vocab[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"top_k": 50, "num_beams": 1, "bad_words_ids": None}  # as files of 2022 have them
    (folder / "config.json").write_text(json.dumps(config))
    return model


def copy_vocabulary(source, folder):
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((source / name).read_bytes())


def save_blip(path, vocab_file):
    """(reference, config, tokenizer) of a `model_large.pth` in small."""
    from imagereward_jax.models.blip_config import TextConfig, VisionConfig

    tokenizer = PromptTokenizer.from_file(vocab_file, 12)
    text = TextConfig(tokenizer.vocab_size, 24, 2, 3, 48, max_position_embeddings=20)
    config = BlipScoreConfig(VisionConfig(28, 14, 32, 2, 4), text, projection_dim=16, max_prompt_tokens=12)
    torch.manual_seed(5)
    model = torch_blip.Blip(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    tensors = model.state_dict()
    extra = {key.replace(".", "_m.", 1): value for key, value in tensors.items()}
    extra |= {"temp": torch.tensor(0.07), "image_queue": torch.zeros(16, 8), "queue_ptr": torch.zeros(1)}
    extra |= {"itm_head.weight": torch.zeros(2, 24), "text_decoder.cls.bias": torch.zeros(3)}
    extra |= {"text_encoder.embeddings.position_ids": torch.arange(20)[None]}
    torch.save({"model": {**tensors, **extra}}, path)
    return model, config, tokenizer


def close(ours, reference):
    reference = reference.detach().numpy()
    assert np.ptp(reference) > 0.02  # images and prompts make a difference
    np.testing.assert_allclose(ours, reference, atol=1e-4)


def test_clip_from_openais_archive(openai, vocab, images, tmp_path):
    model, path = openai
    reward = imagereward_jax.load_score("CLIP", path=path, tokenizer=vocab[0], download_root=tmp_path, device="cpu")
    close(reward.score(PROMPTS, images), model(torch_pixels(images), torch_ids(vocab[0])))
    ranks, rewards = reward.inference_rank(PROMPTS[0], images)
    np.testing.assert_array_equal(np.argsort(np.argsort(-np.array(rewards))) + 1, ranks)


def test_gradients_of_the_clip_score_by_the_images(openai, vocab, tmp_path):
    """It is a reward to train with: d score / d pixels equals PyTorch's within 1e-4 of the largest."""
    model, path = openai
    reward = imagereward_jax.load_score("CLIP", path=path, tokenizer=vocab[0], download_root=tmp_path, device="cpu")
    values = np.random.default_rng(0).random((2, 28, 28, 3), np.float32)
    ours = jax.grad(lambda x: reward.score_grad(PROMPTS[:2], x).sum())(values)
    x = torch.from_numpy(values).requires_grad_()
    pixels = (x - torch.tensor(preprocess.CLIP_MEAN)) / torch.tensor(preprocess.CLIP_STD)
    model(pixels.permute(0, 3, 1, 2), torch_ids(vocab[0], PROMPTS[:2])).sum().backward()
    np.testing.assert_allclose(ours, x.grad, atol=1e-4 * x.grad.abs().max())


def test_aesthetic_reads_the_published_head_over_clip(openai, images, tmp_path):
    model, path = openai
    head = save_head(tmp_path / "head.pth")
    reward = imagereward_jax.load_score(
        "Aesthetic", path=path, head=tmp_path / "head.pth", download_root=tmp_path, device="cpu"
    )
    features = torch.nn.functional.normalize(model.visual(torch_pixels(images)))
    expected = head(features)[:, 0].detach().numpy()
    np.testing.assert_allclose(reward.score("anything", images), expected, atol=1e-4)
    assert reward.score("one", images) == reward.score("another", images)


def test_hpsv2_from_an_openclip_checkpoint(vocab, images, tmp_path):
    """Heads of 80, exact GELU and the mean of pixels that its config states; the image is padded to a square."""
    path = tmp_path / "HPS_v2.1_compressed.pt"
    model = save_openclip(path, vocab[1])
    reward = imagereward_jax.load_score("HPSv2.1", path=path, tokenizer=vocab[0], download_root=tmp_path, device="cpu")
    pixels = torch_pixels(images, preprocess.PAD.normalised_by(HALVES))
    close(reward.score(PROMPTS, images), model(pixels, torch_ids(vocab[0])))


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_pickscore_from_a_folder_of_transformers(vocab, images, tmp_path, max_shard_size):
    """Its score is the cosine times the learnt scale; from one file and from shards."""
    model = save_transformers(tmp_path, vocab, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").is_file() == (max_shard_size == "1GB")
    reward = imagereward_jax.load_score("PickScore", path=tmp_path, device="cpu")
    ids = torch.from_numpy(reward.tokenize(PROMPTS)["input_ids"].astype(np.int64))
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=torch_pixels(images, preprocess.RGB_CROP)).logits_per_image.diag()
    close(reward.score(PROMPTS, images), expected)


def test_blip_from_the_pretraining_checkpoint(vocab_file, images, tmp_path):
    """`model_large.pth` in small, with the momentum copies and queues that it holds beside the two encoders."""
    model, config, tokenizer = save_blip(tmp_path / "model_large.pth", vocab_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "BLIP_LARGE", config)
        reward = imagereward_jax.load_score(
            "BLIP", path=tmp_path / "model_large.pth", tokenizer=vocab_file, device="cpu"
        )
    prompts = ["a red cat", "the blue ball on the ocean", "a", "a painting of a dog, red"]
    tokens = {name: torch.from_numpy(ids).long() for name, ids in tokenizer(prompts).items()}
    close(
        reward.score(prompts, images), model.score(torch_pixels(images), tokens["input_ids"], tokens["attention_mask"])
    )


@pytest.fixture(scope="module")
def home(openai, vocab, vocab_file, tmp_path_factory):
    """A home folder that holds every published file, in small, where `load_score` looks first."""
    home = tmp_path_factory.mktemp("home")
    root = home / ".cache" / "ImageReward"
    (root / "PickScore_v1").mkdir(parents=True)
    (root / "ViT-L-14.pt").write_bytes(openai[1].read_bytes())
    copy_vocabulary(vocab[0], root)
    (root / "vocab.txt").write_bytes(vocab_file.read_bytes())
    save_head(root / scores.AESTHETIC_FILE)
    save_openclip(root / "HPS_v2.1_compressed.pt", vocab[1])
    save_transformers(root / "PickScore_v1", vocab)
    config = save_blip(root / "model_large.pth", vocab_file)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setattr(scores, "BLIP_LARGE", config)
        yield home


@pytest.mark.parametrize("name", scores.SCORES)
def test_the_score_command_takes_every_score_by_name(name, home, images, tmp_path, capsys):
    """Images on the command line: the scores of `load_score`, which are those of the command's table."""
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, image in zip(paths, images):
        image.crop((0, 0, 40, 40)).save(path)  # square, as AlignProp's aesthetic score needs them
    assert score.main(["--model", name, "--prompt", "a red cat", "--json", *map(str, paths)]) == 0
    printed = [row["score"] for row in json.loads(capsys.readouterr().out)["images"]]
    expected = imagereward_jax.load_score(name, device="cpu").score("a red cat", paths)
    np.testing.assert_allclose(printed, expected, atol=1e-5)
    assert printed[0] != printed[1]
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "a red cat", "image": str(path)} for path in paths]))
    flags = ["--input", str(tmp_path / "rows.json"), "--output", str(tmp_path / "out.json")]
    assert score.main(["--model", name, *flags]) == 0
    table = [row["score"] for row in json.loads((tmp_path / "out.json").read_text())]
    np.testing.assert_allclose(table, printed, atol=1e-5)


def shapes_of(tensors):
    return {key: tuple(value.shape) for key, value in tensors.items()}


def layout_of(network, config):
    module = mapping.abstract(lambda: network(config, rngs=nnx.Rngs(0)))
    return {key: leaf.torch_shape for key, leaf in mapping.torch_layout(module).items()}


def count(layout):
    return sum(int(np.prod(shape)) for shape in layout.values())


@pytest.mark.parametrize(
    ("name", "sizes", "total"), [("CLIP", VIT_L, 427_616_513), ("HPSv2.1", VIT_H, 986_109_441)], ids=["L", "H"]
)
def test_every_key_of_the_full_size_clip_layouts_maps(name, sizes, total):
    """OpenAI's and OpenCLIP's names, and transformers' own: the same network, of the published number of parameters."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        published = torch_clip.CLIP(*sizes).state_dict()
    stand_in = {key: np.broadcast_to(np.float32(0), value.shape) for key, value in published.items()}
    tensors = clip_layouts.to_transformers({**stand_in, "context_length": np.array(77)})
    tensors.pop("context_length")
    base = scores.VIT_L if name == "CLIP" else scores.CLIPS[name].base
    config, _ = clip_checkpoint.config_of(tensors, Path("checkpoint"), base)
    assert config.vision.hidden_act == config.text.hidden_act == base.hidden_act
    assert (config.vision.num_attention_heads, config.text.num_attention_heads) == (sizes[0][3], sizes[1][3])
    layout = layout_of(CLIPScoreModel, config)
    assert shapes_of(tensors) == layout and count(layout) == total

    names = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    (image_size, patch_size, *vision), (vocab_size, length, *text), dim, _ = sizes
    towers = [
        {**dict(zip(names, tower)), "intermediate_size": 4 * tower[0], "hidden_act": "gelu"} for tower in (vision, text)
    ]
    their_config = CLIPConfig(
        text_config={**towers[1], "vocab_size": vocab_size, "max_position_embeddings": length},
        vision_config={**towers[0], "image_size": image_size, "patch_size": patch_size},
        projection_dim=dim,
    )
    with torch.device("meta"):
        theirs = shapes_of(dict(CLIPModel(their_config).named_parameters()))
    ours = layout_of(CLIPScoreModel, clip_checkpoint.config_from_json(their_config.to_dict(), "config.json"))
    assert ours == theirs == layout


def test_every_key_of_blip_large_maps():
    """The two encoders and projections of `model_large.pth`: 446 million numbers less ImageReward's head."""
    with torch.device("meta"):
        published = shapes_of(torch_blip.Blip(BlipScoreConfig()).state_dict())
    layout = layout_of(BlipScoreModel, BlipScoreConfig())
    assert layout == published
    manifest = REAL.parent / "manifests" / "imagereward_v1.0.json"
    if manifest.is_file():
        reward = json.loads(manifest.read_text())
        blip = {key.removeprefix("blip."): tuple(shape) for key, shape in reward.items() if key.startswith("blip.")}
        blip.pop("text_encoder.embeddings.position_ids")
        assert layout == blip


@pytest.mark.skipif(not HEAD.exists(), reason="needs the published head beside the checkout, shared/real")
def test_the_published_aesthetic_head_loads():
    """Its ten tensors are just the head of the full-size network, and its numbers give what PyTorch's layers give."""
    tensors = files.read_tensors(HEAD)
    with torch.device("meta"):
        clip = torch_clip.CLIP(*VIT_L).state_dict()
    stand_in = {key: np.broadcast_to(np.float32(0), value.shape) for key, value in clip.items()}
    config, _ = clip_checkpoint.config_of(clip_layouts.to_transformers(stand_in), Path("checkpoint"), scores.VIT_L)
    layout = layout_of(AestheticModel, config)
    assert {f"mlp.{key}": value.shape for key, value in tensors.items()} == {
        key: shape for key, shape in layout.items() if key.startswith("mlp.")
    }
    reference = torch_blip.Head(768, (1024, 128, 64, 16))
    reference.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in tensors.items()})
    embeds = np.random.default_rng(0).standard_normal((5, 768)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    from imagereward_jax.models.blip import RewardHead

    head = mapping.abstract(lambda: RewardHead(768, (1024, 128, 64, 16), rngs=nnx.Rngs(0)))
    ours = nnx.merge(nnx.graphdef(head), mapping.from_torch(head, tensors))(embeds)
    np.testing.assert_allclose(ours, reference(torch.from_numpy(embeds))[:, 0].detach(), atol=1e-4)


@pytest.mark.skipif(not BPE.exists(), reason="needs CLIP's vocabulary beside the checkout, shared/real/clip-bpe")
def test_openais_vocabulary_gives_clips_tokens():
    """49,408 tokens; "a photo of a cat" is [start, 320, 1125, 539, 320, 2368, end], as OpenAI's notebook has it."""
    tokenizer = CLIPPromptTokenizer(BPE, 77)
    assert tokenizer.vocab_size == 49408
    ids = tokenizer(["A photo of a cat", "word " * 100])["input_ids"]
    assert ids.shape == (2, 77)
    np.testing.assert_array_equal(ids[0, :7], [49406, 320, 1125, 539, 320, 2368, 49407])
    assert ids[1, -1] == 49407 and 49407 not in ids[1, :-1]


def test_an_archive_that_names_other_objects_is_refused(tmp_path):
    """A TorchScript archive whose pickle asks for a function is not run, and says so."""
    import pickle
    import zipfile

    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bad/constants.pkl", b"")
        archive.writestr("bad/data.pkl", pickle.dumps(functools.partial(print, "run")))
    with pytest.raises(files.WeightsError, match=r"bad.pt: refused.*functools.partial"):
        files.read_tensors(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(files.WeightsError, match=r"bad.pt: not a whole"):
        files.read_tensors(path)


def test_half_precision_and_shared_storages_of_an_archive_are_read(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.arange(24.0).reshape(4, 6)
            self.register_buffer("view", whole[1:, ::2])
            self.register_buffer("low", whole.half())
            self.inner = torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.inner(x)

    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(str(tmp_path / "net.pt"))
    tensors = files.read_tensors(tmp_path / "net.pt")
    assert tensors.keys() == net.state_dict().keys() and tensors["low"].dtype == np.float16
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(tensors[key], value.numpy())


def test_bad_requests_say_what_to_do(tmp_path):
    aesthetic = ["Aesthetic", "Aesthetic-AlignProp", "Aesthetic-AlignProp-TRL"]
    assert imagereward_jax.available_scores() == ["CLIP", "BLIP", *aesthetic, "PickScore", "HPSv2.1"]
    with pytest.raises(FileNotFoundError, match=r"did you mean 'PickScore'"):
        imagereward_jax.load_score("Pickscore")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt: no such file"):
        imagereward_jax.load_score("CLIP", path=tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="head= applies only to the Aesthetic scores"):
        imagereward_jax.load_score("CLIP", head="x.pth")
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: not a CLIP checkpoint of a known layout"):
        imagereward_jax.load_score("CLIP", path=tmp_path / "other.pt")


def test_a_file_that_is_not_there_is_downloaded_whole(tmp_path):
    (tmp_path / "source").write_bytes(b"weights")
    target = hub.resolve_url((tmp_path / "source").as_uri(), tmp_path / "new" / "target")
    assert target.read_bytes() == b"weights"
    with pytest.raises(hub.ModelNotFound, match=r"could not be downloaded"):
        hub.resolve_url((tmp_path / "none").as_uri(), tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]
