"""Text backbones: each family in small, built here, and the real default."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from sklearn_transfer.backbones import text_folders
from sklearn_transfer.backbones.attention import attend_in_blocks
from sklearn_transfer.backbones.from_transformers import load
from sklearn_transfer.exceptions import BackboneNotFoundError, WeightsError

TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "",
    "the bird sang and the cat sat and the dog ran on and on over the mat",
]
WORDS = sorted(set(" ".join(TEXTS).split()))
SIZE = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 4}
BERT_SIZE = dict(
    **SIZE, num_hidden_layers=3, intermediate_size=48, max_position_embeddings=40
)
CONFIGS = {
    "albert": lambda: transformers.AlbertConfig(
        **{**BERT_SIZE, "num_hidden_layers": 4}, embedding_size=16
    ),
    "albert-groups": lambda: transformers.AlbertConfig(
        **{**BERT_SIZE, "num_hidden_layers": 4}, embedding_size=16, num_hidden_groups=2
    ),
    "bert": lambda: transformers.BertConfig(**BERT_SIZE),
    "camembert": lambda: transformers.CamembertConfig(**BERT_SIZE, pad_token_id=1),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=32,
        dim=32,
        n_heads=4,
        n_layers=3,
        hidden_dim=48,
        max_position_embeddings=40,
    ),
    "electra": lambda: transformers.ElectraConfig(**BERT_SIZE, embedding_size=16),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=32,
        n_embd=32,
        n_head=4,
        n_layer=3,
        n_positions=40,
        bos_token_id=2,
        eos_token_id=3,
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **BERT_SIZE,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
        local_attention=8,
        global_attn_every_n_layers=2,
    ),
    "mpnet": lambda: transformers.MPNetConfig(**BERT_SIZE, pad_token_id=1),
    "roberta": lambda: transformers.RobertaConfig(**BERT_SIZE, pad_token_id=1),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**BERT_SIZE, pad_token_id=1),
}
FAMILIES = sorted(CONFIGS)


def save_tokenizer(folder: Path, special_around=True) -> None:
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    vocab = {token: i for i, token in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    if special_around:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    # Settings that a folder may bring and that must not act.
    backend.enable_truncation(3)
    if special_around:
        backend.enable_padding(length=30)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=10**30, **names
    ).save_pretrained(folder)


def save_model(family: str, folder: Path) -> Path:
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(CONFIGS[family]())
    with torch.no_grad():  # freshly initialised biases are all zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder, special_around=family != "gpt2")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    state = torch.get_rng_state()
    made = {family: save_model(family, root / family) for family in FAMILIES}
    torch.set_rng_state(state)
    return made


@pytest.fixture(params=FAMILIES)
def folder(request, folders):
    return folders[request.param]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    # Two threads for rows of 32 numbers mostly wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def batch(backbone, texts=TEXTS, pad_to_multiple=16):
    return backbone.collate(backbone.tokenize(texts)[0], pad_to_multiple)


def make_sentence_model(plain: Path, folder: Path, *modules) -> Path:
    """A sentence-transformers folder; modules are (kind, config, module or None)."""
    listed = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    transformers.AutoModel.from_pretrained(plain).save_pretrained(folder)
    save_tokenizer(folder)
    for i, (kind, config, module) in enumerate(modules, 1):
        path = folder / f"{i}_{kind}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        if module is not None:
            torch.save(module.state_dict(), path / "pytorch_model.bin")
        listed.append(
            {"path": path.name, "type": f"sentence_transformers.models.{kind}"}
        )
    (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def test_vector_is_the_mean_over_the_models_own_tokens(folder):
    backbone = load(str(folder))
    x = batch(backbone)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    hidden = model(input_ids=x.input_ids, attention_mask=x.attention_mask)[0]
    weights = x.attention_mask.unsqueeze(2).float()
    expected = (hidden * weights).sum(1) / weights.sum(1)
    torch.testing.assert_close(backbone(x), expected, atol=1e-6, rtol=1e-5)
    assert np.isfinite(expected.numpy()).all()  # "" too
    assert expected.std(0).min() > 1e-3  # the texts differ, so the test can fail


def test_every_boundary_resumes(folder):
    backbone = load(str(folder))
    x = batch(backbone)
    vector = backbone(x)
    for k in range(1, backbone.n_stages):
        h = backbone.until(x, k)
        assert torch.equal(backbone.after(h, k), vector)
        for stop in range(k, backbone.n_stages):
            resumed = backbone.run(h, k, stop).hidden
            assert torch.equal(resumed, backbone.until(x, stop).hidden)


def test_a_stage_never_reads_what_a_later_one_owns(folder):
    backbone = load(str(folder))
    x = batch(backbone)
    for k in range(1, backbone.n_stages):
        before = backbone.until(x, k).hidden
        spoiled = copy.deepcopy(backbone)
        for parameter in spoiled.stages[k:].parameters():
            parameter.fill_(float("nan"))
        assert torch.equal(spoiled.until(x, k).hidden, before)
        spoiled = copy.deepcopy(backbone)
        for parameter in spoiled.stages[:k].parameters():
            parameter.fill_(float("nan"))
        if "mpnet" not in backbone.name:  # its layers share the first one's bias
            after = spoiled.after(backbone.until(x, k), k)
            assert torch.equal(after, backbone(x))


def test_stages_hold_every_parameter_of_the_body_once(folder):
    backbone = load(str(folder))
    model = transformers.AutoModel.from_pretrained(folder)
    body = {k: p for k, p in model.named_parameters() if not k.startswith("pooler")}
    mine = list(backbone.parameters())
    assert sum(p.numel() for p in mine) == sum(p.numel() for p in body.values())
    assert all(list(stage.parameters()) for stage in backbone.stages)
    pointers = [t.data_ptr() for t in backbone.state_dict().values()]
    assert len(set(pointers)) == len(pointers) == len(body)
    names = tuple(f"layer.{i}" for i in range(backbone.n_stages - 1))
    assert backbone.stage_names == ("embeddings", *names)


def test_padding_and_company_do_not_change_a_vector(folder):
    backbone = load(str(folder))
    together = backbone(batch(backbone))
    for i, text in enumerate(TEXTS):
        for pad_to_multiple in (1, 16, 32):
            alone = backbone(batch(backbone, [text], pad_to_multiple))
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


def test_taps_pool_every_layer_over_its_unmasked_tokens(folder):
    backbone = load(str(folder))
    x = batch(backbone)
    every = range(1, backbone.n_stages + 1)
    taps = backbone.taps(x, "auto", every)
    torch.testing.assert_close(taps[-1], backbone(x))
    for k in every[:-1]:
        hidden, mask = backbone.until(x, k)
        longest = int(mask[1].sum())
        expected = hidden[1, :longest].mean(0)
        torch.testing.assert_close(taps[k - 1][1], expected, atol=1e-6, rtol=1e-5)


def test_bf16_stays_close_and_resumes(folder):
    backbone = load(str(folder))
    x = batch(backbone)
    exact = backbone(x)
    rounded = copy.deepcopy(backbone).to(torch.bfloat16)
    vector = rounded(x)
    assert vector.dtype == torch.float32
    assert torch.cosine_similarity(vector, exact).min() > 0.998
    for k in range(1, backbone.n_stages):
        h = rounded.until(x, k)
        assert h.hidden.dtype == torch.bfloat16
        assert torch.equal(rounded.after(h, k), vector)
    assert torch.equal(backbone(x), exact)  # the copy shares nothing


def test_gradients_reach_only_the_stages_that_train(folder):
    backbone = load(str(folder))
    x = batch(backbone)
    k = backbone.n_stages - 1
    h = backbone.until(x, k)
    with torch.enable_grad():
        backbone.after(h, k).sum().backward()
    assert all(p.grad is None for p in backbone.stages[0].parameters())
    assert any(p.grad is not None for p in backbone.stages[-1].parameters())
    with torch.enable_grad():
        backbone(x).square().sum().backward()
    trained = [any(p.grad is not None for p in s.parameters()) for s in backbone.stages]
    assert all(trained)


def test_bf16_keeps_rotary_frequencies(folders):
    backbone = load(str(folders["modernbert"]))
    before = {k: b.clone() for k, b in backbone.named_buffers() if "inv_freq" in k}
    backbone.to(torch.bfloat16)
    after = dict(backbone.named_buffers())
    assert before
    for key, buffer in before.items():
        assert after[key].dtype == torch.float32
        assert torch.equal(after[key], buffer)


def test_threads_may_share_a_backbone(folders):
    backbone = load(str(folders["bert"]))
    xs = [batch(backbone, TEXTS[i:]) for i in range(3)]
    expected = [backbone(x) for x in xs]
    wrong = []

    def resume(i):
        for turn in range(20):
            k = 1 + (turn + i) % (backbone.n_stages - 1)
            with torch.no_grad():
                found = backbone.after(backbone.until(xs[i], k), k)
            if not torch.allclose(found, expected[i], atol=1e-6):
                wrong.append((i, k))

    threads = [threading.Thread(target=resume, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- tokens -----------------------------------------------------------------------


def test_tokens_are_cut_and_counted_and_keep_their_special_ends(folders):
    backbone = load(str(folders["bert"]), max_length=6)
    ids, n_cut = backbone.tokenize(TEXTS)
    assert [len(row) for row in ids] == [6, 4, 2, 6]
    assert n_cut == 2
    assert all(row[0] == 2 and row[-1] == 3 for row in ids)
    assert all(row.dtype == np.int32 for row in ids)
    x = backbone.collate(ids, pad_to_multiple=4)
    assert x.input_ids.shape == (4, 8)
    assert x.input_ids[1].tolist() == [*ids[1].tolist(), 1, 1, 1, 1]
    assert x.attention_mask.sum(1).tolist() == [6, 4, 2, 6]


def test_padding_never_passes_the_position_embeddings(folders):
    backbone = load(str(folders["bert"]))
    text = "the cat " * 30
    x = batch(backbone, [text])
    assert x.input_ids.shape == (1, 40)  # 48 would be the multiple of 16
    assert torch.isfinite(backbone(x)).all()


@pytest.mark.parametrize(("family", "longest"), [("bert", 40), ("roberta", 38)])
def test_length_defaults_to_what_the_positions_allow(folders, family, longest):
    assert load(str(folders[family])).recipe.max_length == longest
    for wrong in (0, 2, longest + 1, True):
        with pytest.raises(ValueError, match=f"max_length={wrong}"):
            load(str(folders[family]), max_length=wrong)


def test_gpt2_gives_an_empty_text_one_token(folders):
    backbone = load(str(folders["gpt2"]))
    ids, _ = backbone.tokenize(["", "a dog"])
    assert ids[0].tolist() == [2]
    assert len(ids[1]) == 2
    assert backbone.collate(ids, 4).input_ids[0].tolist() == [2, 3, 3, 3]  # eos pads


def test_prompt_is_put_before_every_text(folders):
    with_prompt = load(str(folders["bert"]), prompt="the cat ")
    plain = load(str(folders["bert"]))
    found = with_prompt.tokenize(["sat", ""])[0]
    expected = plain.tokenize(["the cat sat", "the cat "])[0]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert with_prompt.recipe.prompt == "the cat "
    assert with_prompt.recipe.tokenizer == plain.recipe.tokenizer


@pytest.mark.parametrize(("family", "special"), [("bert", 2), ("gpt2", 0)])
def test_a_prompt_must_leave_room_for_a_token_of_text(folders, family, special):
    prompt, length = "the cat sat ", 3 + special
    folder = str(folders[family])
    one_left = load(folder, max_length=length + 1, prompt=prompt)
    sat, dog = one_left.tokenize(["sat", "dog"])[0]
    assert len(sat) == len(dog) == length + 1
    assert not np.array_equal(sat, dog)
    for wrong in {length, max(special + 1, 2)}:
        with pytest.raises(ValueError, match=f"takes {length} tokens") as caught:
            load(folder, max_length=wrong, prompt=prompt)
        assert f"max_length={wrong}" in str(caught.value)
    assert load(folder, max_length=length, prompt=" ").recipe.prompt == " "


def test_recipe_names_the_tokenizer(folders, tmp_path):
    plain = load(str(folders["bert"])).recipe
    assert load(str(folders["bert"])).recipe == plain
    other = save_model("bert", tmp_path / "other")
    text = (other / "tokenizer.json").read_text().replace('"cat"', '"cow"')
    (other / "tokenizer.json").write_text(text)
    assert load(str(other)).recipe.tokenizer != plain.tokenizer


def test_forked_children_print_no_warning(folders):
    code = (
        "import os, sys\n"
        "from sklearn_transfer.backbones.from_transformers import load\n"
        f"b = load({str(folders['bert'])!r})\n"
        "b.tokenize(['the cat'] * 50)\n"
        "pid = os.fork()\n"
        "b.tokenize(['a dog'] * 50)\n"
        # Recent tokenizers are silent anyway; what silences the others is this:
        "name = 'TOKENIZERS_PARALLELISM'\n"
        "if pid == 0: os._exit(os.environ.get(name) != 'false')\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "assert 'TOKENIZERS_PARALLELISM' not in os.environ\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    env["PYTHONPATH"] = str(Path(text_folders.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- sentence-transformers folders ------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
def test_sentence_folder_pools_as_it_says(folders, tmp_path, mode):
    folder = make_sentence_model(
        folders["bert"], tmp_path / "st", ("Pooling", {"pooling_mode": mode}, None)
    )
    backbone = load(str(folder))
    x = batch(backbone)
    hidden = backbone.run(x, 0, backbone.n_stages).hidden
    row, length = hidden[3], int(x.attention_mask[3].sum())
    expected = {
        "mean": row[:length].mean(0),
        "cls": row[0],
        "max": row[:length].amax(0),
        "lasttoken": row[length - 1],
    }[mode]
    torch.testing.assert_close(backbone(x)[3], expected)
    assert backbone.normalize is False


def test_sentence_folder_with_dense_normalize_and_settings(folders, tmp_path):
    dense = nn.Module()
    dense.linear = nn.Linear(64, 8)
    folder = make_sentence_model(
        folders["bert"],
        tmp_path / "st",
        ("Pooling", {"pooling_mode": ["cls", "mean"]}, None),
        (
            "Dense",
            {
                "in_features": 64,
                "out_features": 8,
                "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            },
            dense,
        ),
        ("Normalize", {}, None),
    )
    (folder / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 9, "do_lower_case": true}'
    )
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "the cat "}, "default_prompt_name": "query"}'
    )
    backbone = load(str(folder))
    assert backbone.normalize is True
    assert (backbone.recipe.max_length, backbone.recipe.prompt) == (9, "the cat ")
    assert load(str(folder), prompt="").recipe.prompt == ""
    lower, upper = backbone.tokenize(["a dog", "A DOG"])[0]
    assert lower.tolist() == upper.tolist()
    x = batch(backbone)
    hidden = backbone.run(x, 0, backbone.n_stages)
    mean = hidden.hidden[1, : int(x.attention_mask[1].sum())].mean(0)
    expected = dense.linear(torch.cat([hidden.hidden[1, 0], mean])).tanh()
    torch.testing.assert_close(backbone(x)[1], expected, atol=1e-6, rtol=1e-5)
    # The Dense layer is the last stage's, once, and follows every move.
    assert any("dense_0" in k for k in dict(backbone.stages[-1].named_parameters()))
    assert sum("linear.weight" in k for k in backbone.state_dict()) == 1
    rounded = copy.deepcopy(backbone).to(torch.bfloat16)
    assert torch.cosine_similarity(rounded(x), backbone(x)).min() > 0.998
    with torch.enable_grad():
        rounded.after(rounded.until(x, 2), 2).sum().backward()
    assert rounded.stages[-1].dense_0.linear.weight.grad is not None
    assert load(str(folder), "random").n_stages == 4


def test_prompt_that_does_not_count_is_left_out_of_the_mean(folders, tmp_path):
    config = {"pooling_mode": "mean", "include_prompt": False}
    folder = make_sentence_model(
        folders["bert"], tmp_path / "st", ("Pooling", config, None)
    )
    backbone = load(str(folder), prompt="the cat ")
    x = batch(backbone, ["sat on the mat"])
    hidden = backbone.run(x, 0, backbone.n_stages).hidden[0]
    length = int(x.attention_mask.sum())
    # [CLS] the cat | sat on the mat [SEP]
    torch.testing.assert_close(backbone(x)[0], hidden[3:length].mean(0))


@pytest.mark.parametrize(
    ("modules", "match"),
    [
        ([("Pooling", {"pooling_mode": "weightedmean"}, None)], "weightedmean"),
        ([("Pooling", {}, None), ("LSTM", {}, None)], "LSTM"),
        ([("Normalize", {}, None), ("Pooling", {}, None)], "Normalize at the end"),
        (
            [
                ("Pooling", {}, None),
                ("Dense", {"activation_function": "os.system"}, None),
            ],
            "os.system",
        ),
    ],
)
def test_what_is_not_supported_is_said(folders, tmp_path, modules, match):
    folder = make_sentence_model(folders["bert"], tmp_path / "st", *modules)
    with pytest.raises(ValueError, match=match):
        load(str(folder))


def test_legacy_pooling_flags(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"word_embedding_dimension": 8, "pooling_mode_cls_token": true, '
        '"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": false}'
    )
    assert text_folders._read_pooling(tmp_path) == (("cls", "avg"), True)


# --- fingerprint ------------------------------------------------------------------


def edit(path: Path, **settings) -> None:
    """Put settings first in a JSON file, whatever their place was."""
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **found, **settings}))


def halved_sliding_angles() -> dict:
    angles = CONFIGS["modernbert"]().to_dict()["rope_parameters"]
    angles["sliding_attention"]["rope_theta"] /= 2
    return angles


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {"num_attention_heads": 2}),
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"layer_norm_eps": 0.1}),
        ("gpt2", {"scale_attn_weights": False}),
        ("modernbert", {"rope_parameters": halved_sliding_angles()}),
        ("roberta", {"pad_token_id": 0}),
    ],
)
def test_equal_tensors_in_another_network_are_another_fingerprint(
    folders, tmp_path, family, settings
):
    folder = save_model(family, tmp_path / family)
    before = load(str(folder))
    assert before.fingerprint() == load(str(folders[family])).fingerprint()
    edit(folder / "config.json", **settings)
    after = load(str(folder))
    tensors = zip(
        before.state_dict().values(), after.state_dict().values(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in tensors)
    assert after.fingerprint() != before.fingerprint()


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2"])
def test_a_setting_that_a_release_adds_changes_no_fingerprint(
    folders, family, monkeypatch
):
    before = load(str(folders[family])).fingerprint()
    config_class = type(CONFIGS[family]())
    to_dict = config_class.to_dict
    monkeypatch.setattr(
        config_class, "to_dict", lambda self: {**to_dict(self), "novelty": 3}
    )
    assert load(str(folders[family])).fingerprint() == before


def test_where_a_network_comes_from_is_not_in_its_fingerprint(folders, tmp_path):
    folder = save_model("bert", tmp_path / "bert")
    edit(
        folder / "config.json",
        _name_or_path="elsewhere",
        architectures=["BertForSequenceClassification"],
        dtype="bfloat16",
        id2label={"0": "cat", "1": "dog"},
        label2id={"cat": 0, "dog": 1},
        output_hidden_states=True,
        transformers_version="4.41.0",
        use_cache=False,
        vocab_size=32,  # the same, at another place in the file
    )
    assert load(str(folder)).fingerprint() == load(str(folders["bert"])).fingerprint()


def test_pooling_prompt_and_activation_are_in_the_fingerprint(folders, tmp_path):
    dense = nn.Module()
    dense.linear = nn.Linear(32, 8)
    settings = {"in_features": 32, "out_features": 8}
    folder = make_sentence_model(
        folders["bert"],
        tmp_path / "st",
        ("Pooling", {"pooling_mode": "mean"}, None),
        ("Dense", settings, dense),
    )

    def fingerprint():
        return load(str(folder), prompt="the cat ").fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    for module, change in (
        ("1_Pooling", {"pooling_mode": "max"}),
        ("1_Pooling", {"include_prompt": False}),
        ("2_Dense", {"activation_function": "torch.nn.modules.linear.Identity"}),
    ):
        edit(folder / module / "config.json", **change)
        seen.append(fingerprint())
    assert len(set(seen)) == 4


# --- weights ----------------------------------------------------------------------


def test_random_is_seeded_and_leaves_the_global_state(folders):
    state = torch.get_rng_state()
    one, two = (load(str(folders["bert"]), "random") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != load(str(folders["bert"])).fingerprint()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_weight_file(folders, tmp_path, suffix, prefix):
    published = load(str(folders["bert"]))
    model = transformers.AutoModel.from_pretrained(folders["bert"])
    state = {prefix + k: t + 0.125 for k, t in model.state_dict().items()}
    state["classifier.weight"] = torch.zeros(7, 32)
    path = str(tmp_path / f"tuned{suffix}")
    if suffix == ".pth":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    tuned = load(str(folders["bert"]), path)
    for mine, theirs in zip(tuned.parameters(), published.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs + 0.125)


def test_a_missing_tensor_is_an_error(folders, tmp_path):
    state = transformers.AutoModel.from_pretrained(folders["bert"]).state_dict()
    gone = "encoder.layer.1.output.dense.weight"
    del state[gone]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(WeightsError, match=gone):
        load(str(folders["bert"]), str(tmp_path / "broken.pth"))


def test_a_checkpoint_that_lacks_a_tensor_is_an_error(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model("bert", tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    gone = "encoder.layer.1.output.dense.weight"
    del state[gone]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=gone):
        load(str(folder))


def test_a_checkpoint_without_pooler_or_with_a_head_is_complete(folders, tmp_path):
    folder = save_model("bert", tmp_path / "bert")
    model = transformers.BertForMaskedLM.from_pretrained(folder)
    model.save_pretrained(folder)
    state = torch.get_rng_state()
    assert load(str(folder)).fingerprint() == load(str(folders["bert"])).fingerprint()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pickle_is_never_run(folders, tmp_path):
    ran = tmp_path / "ran"
    folder = save_model("bert", tmp_path / "bert")
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"x": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="refused"):
        load(str(folder))
    assert not ran.exists()


def test_loading_is_silent_and_restores_the_switches(folders, capfd):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    def switches():
        return (
            logging.get_verbosity(),
            logging.is_progress_bar_enabled(),
            are_progress_bars_disabled(),
        )

    before = switches()
    load(str(folders["bert"]))
    load(str(folders["gpt2"]), "random")
    assert capfd.readouterr() == ("", "")
    assert switches() == before


# --- where files are looked for ---------------------------------------------------


def test_other_families_are_named(tmp_path):
    transformers.T5Config(
        d_model=8, num_layers=1, num_heads=1, d_ff=8, vocab_size=9
    ).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"'t5'.*'bert'"):
        load(str(tmp_path))


def test_folder_errors(folders, tmp_path):
    with pytest.raises(BackboneNotFoundError, match="no such folder"):
        load(str(tmp_path / "absent"))
    with pytest.raises(BackboneNotFoundError, match=r"config\.json"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="no revision 'main'"):
        load(str(folders["bert"]), "main")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def test_offline_and_absent(hub_cache):
    with pytest.raises(BackboneNotFoundError) as caught:
        load("some-org/some-model", "v2")
    message = str(caught.value)
    for part in ("some-org/some-model", "'v2'", str(hub_cache), "HF_HUB_OFFLINE"):
        assert part in message
    assert "pip install" not in message


def test_offline_default_without_the_package(hub_cache, monkeypatch):
    monkeypatch.setattr(text_folders, "PACKAGED_MODEL", "no_such_package")
    with pytest.raises(BackboneNotFoundError, match=r"sklearn-transfer\[offline\]"):
        load(text_folders.DEFAULT_NAME)


def test_a_package_with_other_weights_is_not_used(hub_cache, monkeypatch, tmp_path):
    package = tmp_path / "fake_minilm"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(text_folders, "PACKAGED_MODEL", "fake_minilm")
    with pytest.raises(BackboneNotFoundError, match="fake_minilm was not used"):
        load(text_folders.DEFAULT_NAME)


def test_a_download_laid_in_the_cache_loads_offline(hub_cache, folders):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = hub_cache / "models--some-org--some-model"
    save_model("bert", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    expected = load(str(folders["bert"])).fingerprint()
    assert load("some-org/some-model").fingerprint() == expected
    assert load("some-org/some-model", commit).fingerprint() == expected
    (repo / "refs" / "refs" / "pr").mkdir(parents=True)
    (repo / "refs" / "refs" / "pr" / "1").write_text(commit)
    assert load("some-org/some-model", "refs/pr/1").fingerprint() == expected
    (repo / "snapshots" / commit / "model.safetensors").unlink()
    load("some-org/some-model", "random")  # needs no weights
    with pytest.raises(BackboneNotFoundError, match=r"model\.safetensors"):
        load("some-org/some-model")


# --- attention --------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_blocks_is_attention(monkeypatch, masked):
    from sklearn_transfer.backbones import attention

    monkeypatch.setattr(attention, "BLOCK", 3 * 2 * 7 * 7)  # blocks of 3, 3, 1
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 7, 2, 7, 16, generator=generator)
    mask = None
    if masked:
        mask = (torch.arange(7) < torch.arange(1, 8)[:, None])[:, None, None, :]
        mask = mask.expand(7, 1, 7, 7)
    found = attend_in_blocks(query, key, value, mask, 0.3)
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


# --- the real default -------------------------------------------------------------

SENTENCES = [
    f"{start} {middle} {end}."
    for start in ("A bird", "The parliament", "My old bicycle", "Nobody", "42 people")
    for middle in ("sings in", "voted against", "is nearly", "remembers")
    for end in ("the garden", "naïve façades, 東京 and — so they say — £3.50 tea")
] + ["", "word " * 400, "ok", "Ünïcödé", "a\tb\nc", "!?", "x" * 300, "I", "the", "0"]


@pytest.mark.skipif(
    importlib.util.find_spec(text_folders.PACKAGED_MODEL) is None
    or importlib.util.find_spec("sentence_transformers") is None,
    reason="needs the packaged all-MiniLM-L6-v2 and sentence-transformers",
)
def test_default_equals_sentence_transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import sentence_transformers

    backbone = load(text_folders.DEFAULT_NAME)
    assert backbone.stage_names == ("embeddings", *(f"layer.{i}" for i in range(6)))
    assert backbone.normalize is True
    assert backbone.recipe.max_length == 256
    model = sentence_transformers.SentenceTransformer(
        str(text_folders._packaged_default()[0]), device="cpu", local_files_only=True
    )
    assert len(SENTENCES) == 50
    expected = model.encode(SENTENCES, show_progress_bar=False)
    ids, n_cut = backbone.tokenize(SENTENCES)
    assert n_cut == 1
    x = backbone.collate(ids)
    found = nn.functional.normalize(backbone(x)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    rounded = copy.deepcopy(backbone).to(torch.bfloat16)
    cosine = torch.cosine_similarity(rounded(x), torch.from_numpy(found))
    assert cosine.min() > 0.9995


def test_a_loaded_network_does_not_hang_on_its_file(tmp_path):
    """Written over with zeros, then cut short, under a running process."""
    folder = save_model("bert", tmp_path / "model")
    backbone = load(str(folder))
    before = backbone.fingerprint()
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert backbone.fingerprint() == before
    file.write_bytes(b"")
    assert backbone.fingerprint() == before
