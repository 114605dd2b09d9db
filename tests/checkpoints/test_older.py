"""Older checkpoints: what can be converted computes the same numbers, and what cannot is refused with the reason.

Files are made here by code. Their logits are computed by `reference`, which shares nothing with model.py.
"""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sample
from core.checkpoints.__main__ import main
from core.checkpoints.checkpoint import load_checkpoint
from core.checkpoints.older import convert_checkpoint
from core.checkpoints.weights import build_model
from core.common.errors import UserError
from model import ModelMode

ROOT = Path(__file__).parent.parent.parent
LETTERS = 'abcde'
V0, D, H, LAYERS, T = len(LETTERS), 8, 2, 2, 6
ARGS = {'n_layer': LAYERS, 'n_head': H, 'n_embd': D, 'block_size': T, 'bias': False, 'dropout': 0.0}


def older_file(folder: Path, size: int = V0 + 1, absolute: bool = False, bias: bool = False, prefix: str = '',
               **args: object) -> dict[str, object]:
    """An older checkpoint of a model of random weights and `size` ids; meta.pkl of its letters is in `folder` too."""
    generator = torch.Generator().manual_seed(size)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    weights = {'transformer.wte.weight': random(size, D), 'transformer.ln_f.weight': 1 + random(D)}
    if absolute:
        weights['transformer.wpe.weight'] = random(T, D)
    for layer in range(LAYERS):
        at = f'transformer.h.{layer}.'
        weights |= {at + 'ln_1.weight': 1 + random(D), at + 'ln_2.weight': 1 + random(D),
                    at + 'attn.query_norm.weight': 1 + random(D // H), at + 'attn.key_norm.weight': 1 + random(D // H)}
        for name, width, depth in (('attn.c_attn', 3 * D, D), ('attn.c_proj', D, D), ('mlp.c_fc', 4 * D, D),
                                   ('mlp.c_proj', D, 4 * D)):
            weights[f'{at}{name}.weight'] = random(width, depth)
            if bias:
                weights[f'{at}{name}.bias'] = random(width)
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'meta.pkl').write_bytes(pickle.dumps({
        'vocab_size': V0, 'itos': dict(enumerate(LETTERS)), 'stoi': {letter: i for i, letter in enumerate(LETTERS)}}))
    return {'model': {prefix + name: weight for name, weight in weights.items()}, 'optimizer': {'state': {}},
            'model_args': {**ARGS, 'bias': bias, 'vocab_size': size, 'attention_type': 'bidirectional', **args},
            'iter_num': 7, 'best_val_loss': 2.5, 'config': {'dataset': 'letters', 'learning_rate': 1e-3}}


def rms(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def turned(x: Tensor) -> Tensor:
    """Rotary positions on one head [T, width]: pair (i, i + width / 2) turns by position * 10000^(-2 i / width)."""
    half = x.size(1) // 2
    angle = torch.tensor([[place * 10000.0 ** (-2 * i / x.size(1)) for i in range(half)] for place in range(len(x))],
                         dtype=torch.float64)
    whole = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((whole.real, whole.imag), dim=1)


def reference(older: dict[str, object], tokens: list[int], causal: bool = False) -> Tensor:
    """Hidden states [T, D] after the last norm, one head and one row at a time in float64."""
    w = {name.removeprefix('_orig_mod.'): weight.double() for name, weight in older['model'].items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[name + '.weight'].T + w.get(name + '.bias', 0.0)

    absolute = 'transformer.wpe.weight' in w
    x = w['transformer.wte.weight'][tokens] + (w['transformer.wpe.weight'][:len(tokens)] if absolute else 0.0)
    x = rms(x)
    for layer in range(LAYERS):
        at = f'transformer.h.{layer}.'
        q, k, v = linear(rms(x, w[at + 'ln_1.weight']), at + 'attn.c_attn').split(D, dim=1)
        heads = []
        for part in range(H):
            mine = slice(part * D // H, (part + 1) * D // H)
            query, key = (rms(one[:, mine], w[f'{at}attn.{name}_norm.weight']) for one, name in ((q, 'query'), (k, 'key')))
            if not absolute:
                query, key = turned(query), turned(key)
            scores = query @ key.T / math.sqrt(D // H)
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(1) @ v[:, mine])
        x = x + linear(torch.cat(heads, dim=1), at + 'attn.c_proj')
        x = x + linear(linear(rms(x, w[at + 'ln_2.weight']), at + 'mlp.c_fc').clamp(min=0).pow(2), at + 'mlp.c_proj')
    return rms(x, w['transformer.ln_f.weight'])


def converted(older: dict[str, object], folder: Path):
    """(checkpoint, model) of the file that the conversion writes."""
    torch.save(older, folder / 'old.pt')
    convert_checkpoint(folder / 'old.pt', folder / 'new.pt', folder / 'meta.pkl')
    checkpoint = load_checkpoint(folder / 'new.pt')
    return checkpoint, build_model(checkpoint).double()


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
@pytest.mark.parametrize('absolute, bias', [(False, False), (True, False), (False, True), (True, True)])
def test_a_converted_model_computes_the_old_logits(tmp_path, absolute, bias, prefix):
    older = older_file(tmp_path, absolute=absolute, bias=bias, prefix=prefix, mask_token_id=V0,
                       mode=ModelMode.LANGUAGE_MODEL)
    checkpoint, model = converted(older, tmp_path)
    tokens = [0, V0, 3, V0, 1, 4]
    hidden = reference(older, tokens)
    found = model(torch.tensor([tokens]))
    torch.testing.assert_close(found.hidden_states[0], hidden, atol=1e-6, rtol=1e-6)
    embedding = older['model'][f'{prefix}transformer.wte.weight'].double()
    torch.testing.assert_close(found.logits[0, :, :V0 + 1], hidden @ embedding.T, atol=1e-6, rtol=1e-6)
    assert checkpoint.kind == 'unmasking' and checkpoint.iteration == 7 and not checkpoint.resumable
    assert checkpoint.config['dataset'] == 'letters' and checkpoint.vocabulary['tokens'] == list(LETTERS)


def test_special_ids_are_moved_to_their_order(tmp_path):
    """Old: cls, wrong, mask after the letters. Today: mask, wrong, pad (new, hence zero), cls."""
    old = {'cls_token_id': V0, 'wrong_token_id': V0 + 1, 'mask_token_id': V0 + 2}
    older = older_file(tmp_path, V0 + 3, **old)
    torch.manual_seed(1)
    older['model'] |= {'critic_head.weight': torch.randn(1, D), 'critic_head.bias': torch.randn(1)}
    older['model_args']['add_critic_head'] = True
    _, model = converted(older, tmp_path)
    hidden = reference(older, [old['cls_token_id'], 0, old['mask_token_id'], 4, old['wrong_token_id'], 2])
    found = model.encode(torch.tensor([[model.config.cls_token_id, 0, model.config.mask_token_id, 4,
                                        model.config.wrong_token_id, 2]]))[0]
    torch.testing.assert_close(found, hidden, atol=1e-6, rtol=1e-6)
    critic = hidden @ older['model']['critic_head.weight'][0].double() + older['model']['critic_head.bias'].double()
    torch.testing.assert_close(model.critic_logits(found), critic, atol=1e-6, rtol=1e-6)
    assert not model.transformer['wte'].weight[model.config.pad_token_id].any()


def test_the_output_rows_of_a_sampler_head_move_too(tmp_path):
    older = older_file(tmp_path, V0 + 2, mask_token_id=V0 + 1, wrong_token_id=V0, add_sampler_head=True,
                       sampler_residual=False)
    shapes = {'input.weight': (D, 3 * D), 'hidden.weight': (D, D), 'output_head.weight': (V0 + 2, D)}
    shapes |= {f'{name}.{part}': (D,) for name, part in (
        ('input', 'bias'), ('hidden', 'bias'), ('norm_1', 'weight'), ('norm_1', 'bias'), ('norm_2', 'weight'),
        ('norm_2', 'bias'))}
    torch.manual_seed(2)
    head = {name: torch.randn(shape) for name, shape in shapes.items()}
    older['model'] |= {f'sampler_head.{name}': weight for name, weight in head.items()}
    _, model = converted(older, tmp_path)
    x = torch.randn(3 * D, dtype=torch.float64)
    w = {name: weight.double() for name, weight in head.items()}
    y = x
    for layer, norm in (('input', 'norm_1'), ('hidden', 'norm_2')):
        y = w[layer + '.weight'] @ y + w[layer + '.bias']
        y = y * torch.sigmoid(y)
        y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt() * w[norm + '.weight'] + w[norm + '.bias']
    logits = w['output_head.weight'] @ y
    found = model.sampler_head(x, torch.zeros(V0 + 4).double(), model.lm_head.weight)
    expected = torch.cat((logits[:V0], logits[V0 + 1:], logits[V0:V0 + 1], torch.zeros(2)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('args, config, kind', [
    ({'attention_type': 'causal'}, {}, 'causal'), ({}, {'training_type': 'remasking'}, 'remasking'),
    ({'mode': 'language_model'}, {'training_type': 'unmasking'}, 'unmasking')])
def test_the_kind_follows_from_the_options(tmp_path, args, config, kind):
    older = older_file(tmp_path, **args)
    older['config'] |= config
    checkpoint, model = converted(older, tmp_path)
    assert checkpoint.kind == kind
    found = model.encode(torch.tensor([[0, 1, 2]]))[0]
    torch.testing.assert_close(found, reference(older, [0, 1, 2], causal=kind == 'causal'), atol=1e-6, rtol=1e-6)


def test_the_command_converts_and_sample_writes_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('MASKED_DIFFUSION_DATA_DIR', str(tmp_path / 'data'))
    monkeypatch.chdir(tmp_path)
    older = older_file(tmp_path / 'data' / 'letters')
    torch.save(older, 'old.pt')
    Path('out').mkdir()
    main(['convert', 'old.pt', 'out/new.pt'])
    assert 'old.pt converted to out/new.pt: unmasking, iteration 7' in capsys.readouterr().out
    sample.main(['--checkpoint_name=new.pt', '--num_samples=1', '--iterations=3', '--quality_metric=none'])
    text = capsys.readouterr().out.split('--- sample 0')[1].split('\n')[1]
    assert len(text) == T and set(text) <= set(LETTERS)


def changed(older: dict[str, object], **changes: object) -> dict[str, object]:
    return {**older, **changes}


REFUSALS = [
    (lambda old: changed(old, model={name: weight for name, weight in old['model'].items() if '_norm' not in name}),
     'its network is built as GPT-2 is, without normalised queries and keys'),
    (lambda old: changed(old, model=old['model'] | {'lm_head.weight': torch.zeros(V0 + 1, D)}),
     'its output matrix lm_head is not its token embedding'),
    (lambda old: changed(old, model=old['model'] | {'transformer.h.0.ln_1.bias': torch.zeros(D)}),
     r'has weights this model does not have \(transformer.h.0.ln_1.bias\)'),
    (lambda old: changed(old, model=old['model'] | {'lm_head.weight': torch.zeros(3, D)}),
     r'holds lm_head.weight of the shape \(3, 8\), but the model has 6 ids'),
    (lambda old: changed(old, model_args={name: value for name, value in old['model_args'].items()
                                          if name != 'attention_type'}),
     'its model_args do not say attention_type, which no weight shows'),
    (lambda old: changed(old, model_args=old['model_args'] | {'activation': 'gelu'}),
     r'describes its model with unknown options \(activation\)'),
    (lambda old: changed(old, model_args=old['model_args'] | {'mask_token_id': 2}),
     r'has 6 ids and names the special ones \[2\], but after the 5 of the vocabulary these should be \[5\]'),
    (lambda old: changed(old, model_args=old['model_args'] | {'n_layer': 3}), 'lacks weights of this model'),
    (lambda old: changed(old, model={}), 'has no weights of a GPT'),
    (lambda old: {'model': old['model']}, 'has no usable model_args, iter_num, config'),
    (lambda old: changed(old, iter_num=2.5), 'has no usable iter_num'),
    (lambda old: [1, 2], 'is not in the older format'),
    (lambda old: changed(old, format_version=1), "is in today's format; there is nothing to convert"),
    (lambda old: changed(old, config=Path('x')), 'something other than tensors and plain values'),
]


@pytest.mark.parametrize('change, words', REFUSALS, ids=range(len(REFUSALS)))
def test_what_cannot_be_converted_is_refused_with_the_reason(tmp_path, change, words):
    torch.save(change(older_file(tmp_path)), tmp_path / 'old.pt')
    with pytest.raises(UserError, match=words) as caught:
        convert_checkpoint(tmp_path / 'old.pt', tmp_path / 'new.pt', tmp_path / 'meta.pkl')
    assert '\n' not in str(caught.value) and not (tmp_path / 'new.pt').exists()


def test_nothing_is_replaced_and_no_vocabulary_is_guessed(tmp_path, small_corpus, monkeypatch):
    older = older_file(tmp_path)
    torch.save(older, tmp_path / 'old.pt')
    (tmp_path / 'there').write_text('mine')
    with pytest.raises(UserError, match='exists, and nothing is replaced; name a new file'):
        convert_checkpoint(tmp_path / 'old.pt', tmp_path / 'there', tmp_path / 'meta.pkl')
    assert (tmp_path / 'there').read_text() == 'mine'
    for dataset, words in ((None, 'does not name its corpus'), ('absent', 'is not there'),
                           (small_corpus.name, 'prepared by this program, perhaps from another text')):
        torch.save(changed(older, config={'dataset': dataset}), tmp_path / 'old.pt')
        with pytest.raises(UserError, match=f'{words}.*add --meta='):
            convert_checkpoint(tmp_path / 'old.pt', tmp_path / 'new.pt')


def test_loading_names_the_command_and_a_refusal_ends_with_code_2(tmp_path):
    torch.save(changed(older_file(tmp_path), model={'transformer.wte.weight': torch.zeros(V0, D)}), tmp_path / 'old.pt')
    with pytest.raises(UserError, match=r'no format version.*try: python -m core.checkpoints convert .*old.pt NEW_FILE'):
        load_checkpoint(tmp_path / 'old.pt')
    done = subprocess.run([sys.executable, '-m', 'core.checkpoints', 'convert', str(tmp_path / 'old.pt'),
                           str(tmp_path / 'new.pt')], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'cannot be converted' in done.stderr
