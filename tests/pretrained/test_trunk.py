"""Five architectures of the transformers library as trunks: the same logits as the library's own call, whatever a text
is framed with, padded to or shifted by; and what is refused."""

import pytest
import torch

pytest.importorskip('transformers')

from core.common.errors import UserError
from core.pretrained.loading import Source, load_pretrained
from helpers.pretrained import TEXTS, save_tiny

CPU = torch.device('cpu')
QWEN = {'predicts': 'next', 'mask_token': '<|mask|>'}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('tiny')
    return {kind: save_tiny(kind, root / kind) for kind in TEXTS}


def source(folders, kind, **changes):
    return Source(str(folders[kind]), **{**(QWEN if kind == 'qwen2' else {}), **changes})


def library_logits(folder, kind, ids, attention_mask=None):
    """What the library's own call gives, and for Qwen2 the same with every position seen."""
    import transformers as library

    if kind != 'qwen2':
        model = library.AutoModelForMaskedLM.from_pretrained(folder).eval()
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=attention_mask).logits
    model = library.Qwen2ForCausalLM.from_pretrained(folder, attn_implementation='eager').eval()
    seen = torch.ones_like(ids) if attention_mask is None else attention_mask
    blocked = torch.zeros(len(ids), 1, ids.size(1), ids.size(1)).masked_fill(seen[:, None, None, :] == 0, -1e9)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=blocked).logits
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1)  # as Dream's own code does


def masked_rows(base, text):
    """Two texts of the tokenizer's ids, some masked, and which of the framed ids are theirs."""
    ids = torch.tensor([base.vocabulary.encode(text)] * 2)
    ids[0, 2], ids[1, -1], ids[1, 0] = (base.vocabulary.mask_token_id,) * 3
    return ids


def framed(base, ids):
    before, after, _ = base.model.framing
    return torch.cat([ids.new_tensor(before).expand(len(ids), -1), ids, ids.new_tensor(after).expand(len(ids), -1)], 1)


@pytest.mark.parametrize('kind', TEXTS)
def test_the_logits_are_the_librarys_own(folders, kind):
    base = load_pretrained(source(folders, kind), CPU)
    ids = masked_rows(base, TEXTS[kind])
    expected = library_logits(folders[kind], kind, framed(base, ids))
    first = len(base.model.framing.before)
    expected = expected[:, first:first + ids.size(1)]
    torch.testing.assert_close(base.model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    positions = torch.tensor([2, ids.numel() - 1])
    at = base.model.lm_head(base.model.encode(ids, positions=positions))
    torch.testing.assert_close(at, expected.flatten(0, 1)[positions], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', TEXTS)
def test_the_frame_is_what_the_tokenizer_puts_around_a_text(folders, kind):
    import transformers as library

    base = load_pretrained(source(folders, kind), CPU)
    ids = torch.tensor([base.vocabulary.encode(TEXTS[kind])])
    own = library.AutoTokenizer.from_pretrained(folders[kind])(TEXTS[kind])['input_ids']
    assert framed(base, ids)[0].tolist() == own
    assert (len(base.model.framing.before), len(base.model.framing.after)) == ((0, 0) if kind == 'qwen2' else (1, 1))
    text = base.vocabulary.decode([*ids[0].tolist(), base.vocabulary.mask_token_id])
    assert text.removesuffix('_').strip() == TEXTS[kind].strip()


@pytest.mark.parametrize('kind', ['bert', 'roberta', 'modernbert', 'esm', 'qwen2'])
def test_padding_changes_no_text(folders, kind):
    base = load_pretrained(source(folders, kind), CPU)
    ids = masked_rows(base, TEXTS[kind])
    short = ids.size(1) - 3
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, short:] = False
    padded = base.model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, :short], base.model(ids[:1, :short]).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[1], base.model(ids[1:]).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', TEXTS)
def test_special_ids_are_never_drawn(folders, kind):
    base = load_pretrained(source(folders, kind), CPU)
    tokenizer, allowed = base.vocabulary.tokenizer, base.vocabulary.allowed
    framing = base.model.framing
    special = {*tokenizer.all_special_ids, base.vocabulary.mask_token_id, *framing.before, *framing.after}
    assert special and not allowed[sorted(special)].any()
    named = {token for token in tokenizer.get_vocab().values() if token < len(allowed)}
    assert not allowed[sorted(set(range(len(allowed))) - named)].any()  # rows of the output matrix that mean nothing
    assert set(allowed.nonzero().flatten().tolist()) == named - special - (
        {tokenizer.get_vocab()['<null_1>']} if kind == 'esm' else set())
    assert allowed.sum() == base.vocabulary.base_size


def test_length_limits(folders):
    lengths = {kind: load_pretrained(source(folders, kind), CPU).model.config.block_size for kind in TEXTS}
    assert lengths == {'bert': 22, 'roberta': 39, 'modernbert': 62, 'esm': 38, 'qwen2': 32}
    longest = load_pretrained(source(folders, 'roberta'), CPU)
    ids = torch.full((1, 39), longest.vocabulary.encode('a')[0])
    assert longest.model(ids).logits.shape == (1, 39, longest.vocabulary.size)
    assert longest.model.at_most(7).config.block_size == 7


def test_a_position_of_a_shifted_model_is_predicted_from_the_one_before(folders):
    shifted = load_pretrained(source(folders, 'qwen2'), CPU).model
    own = load_pretrained(source(folders, 'qwen2', predicts='own'), CPU).model
    ids = torch.arange(10, 16)[None]
    torch.testing.assert_close(shifted(ids).logits[:, 1:], own(ids).logits[:, :-1])
    torch.testing.assert_close(shifted(ids).logits[:, 0], own(ids).logits[:, 0])


def test_bfloat16_weights(folders):
    base = load_pretrained(source(folders, 'bert'), CPU, torch.bfloat16)
    ids = masked_rows(base, TEXTS['bert'])
    assert base.model.lm_head.weight.dtype is torch.bfloat16
    exact = load_pretrained(source(folders, 'bert'), CPU).model(ids).logits
    assert (base.model(ids).logits.float() - exact).abs().max() < 0.05 * exact.abs().max()


# What is refused ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, changes, words', [
    ('qwen2', {'predicts': 'auto'}, 'is a causal model .qwen2.*--predicts=own or --predicts=next'),
    ('qwen2', {'mask_token': None}, 'names no mask token; give it'),
    ('qwen2', {'mask_token': '<|no|>'}, "mask_token is '<.no.>', which the tokenizer"),
])
def test_what_a_model_does_not_say_must_be_said(folders, kind, changes, words):
    with pytest.raises(UserError, match=words):
        load_pretrained(source(folders, kind, **changes), CPU)


def test_a_masked_class_that_sees_the_left_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match='predicts from the text on the left alone'):
        load_pretrained(Source(str(save_tiny('bert', tmp_path / 'left', is_decoder=True))), CPU)


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    import transformers as library

    library.BartConfig().save_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(b'')
    with pytest.raises(UserError, match='encoder with a decoder'):
        load_pretrained(Source(str(tmp_path)), CPU)


def test_folders_that_lack_something(tmp_path, folders):
    import shutil

    with pytest.raises(UserError, match='there is no such folder'):
        load_pretrained(Source(str(tmp_path / 'none')), CPU)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='without config.json'):
        load_pretrained(Source(str(tmp_path / 'empty')), CPU)
    for name, lost, words in (('weightless', 'model.safetensors', 'holds no weights'),
                              ('wordless', 'vocab.txt', 'the tokenizer of .* cannot be read|names no mask token|'
                                                        'no token that a text')):
        shutil.copytree(folders['bert'], tmp_path / name)
        (tmp_path / name / lost).unlink()
        with pytest.raises(UserError, match=words):
            load_pretrained(Source(str(tmp_path / name)), CPU)


def test_a_name_on_the_hub_without_network(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(UserError, match='could not be fetched from the hub'):
        load_pretrained(Source('nobody/no-such-model'), CPU)


class Shout:
    """What runs when its pickle is loaded without care."""

    def __reduce__(self):
        return print, ('the pickle ran',)


def test_pickled_weights_are_read_without_running_anything(tmp_path, folders, capsys):
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(folders['bert'], tmp_path / 'bin')
    weights = load_file(tmp_path / 'bin' / 'model.safetensors')
    (tmp_path / 'bin' / 'model.safetensors').unlink()
    torch.save(weights, tmp_path / 'bin' / 'pytorch_model.bin')
    base, first = load_pretrained(Source(str(tmp_path / 'bin')), CPU), load_pretrained(source(folders, 'bert'), CPU)
    ids = masked_rows(base, TEXTS['bert'])
    assert torch.equal(base.model(ids).logits, first.model(ids).logits)
    torch.save({**weights, 'more': Shout()}, tmp_path / 'bin' / 'pytorch_model.bin')
    with pytest.raises(UserError, match='weights of .* cannot be read'):
        load_pretrained(Source(str(tmp_path / 'bin')), CPU)
    assert 'the pickle ran' not in capsys.readouterr().out


def test_missing_weights_are_not_made_up(tmp_path, folders):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folders['bert'], tmp_path / 'headless')
    weights = {name: weight for name, weight in load_file(tmp_path / 'headless' / 'model.safetensors').items()
               if 'transform' not in name}
    save_file(weights, tmp_path / 'headless' / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(UserError, match='lacks .* weights of BertForMaskedLM'):
        load_pretrained(Source(str(tmp_path / 'headless')), CPU)


def test_code_of_the_models_own_is_not_run(tmp_path, folders, capsys):
    import json
    import shutil

    shutil.copytree(folders['bert'], tmp_path / 'own')
    config = json.loads((tmp_path / 'own' / 'config.json').read_text())
    config |= {'model_type': 'strange', 'auto_map': {'AutoConfig': 'strange.StrangeConfig',
                                                     'AutoModelForMaskedLM': 'strange.Strange'}}
    (tmp_path / 'own' / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'own' / 'strange.py').write_text('print("the code ran")\n')
    with pytest.raises(UserError, match='add --trust_remote_code=True'):
        load_pretrained(Source(str(tmp_path / 'own')), CPU)
    assert 'the code ran' not in capsys.readouterr().out


@pytest.mark.parametrize('kind, text, words', [
    ('bert', 'the wizard says', "no tokens for 'wizard'"), ('esm', 'MKT7', "does not know: '7'"),
    ('bert', 'the [MASK] says', r"holds '\[MASK\]', a special token"), ('roberta', 'to <mask> be', 'a special token'),
    ('roberta', 'to be</s>', 'a special token')])
def test_text_that_the_model_does_not_know(folders, kind, text, words):
    with pytest.raises(UserError, match=words):
        load_pretrained(source(folders, kind), CPU).vocabulary.encode(text)
