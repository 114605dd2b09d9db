"""lm-evaluation-harness itself, with a task file of our own that reads local data, on a checkpoint of this program and
on a model of the transformers library made on the spot."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('lm_eval', reason='lm_eval is not installed (pip install lm_eval)')
pytest.importorskip('transformers', reason='transformers is not installed')

import lm_eval
from lm_eval.tasks import TaskManager

import core.evaluation.harness.language_model as language_model
from core.common.errors import UserError
from core.data.learning import character_vocabulary
from core.pretrained.loading import Source, load_pretrained
from helpers.pretrained import save_tiny
from helpers.toys import model_over, save_model

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = 'the king says to be or not to be, the queen\n'
DOCUMENTS = [
    {'context': 'the king says to ', 'choices': ['be', 'or not to be', 'the'], 'answer': 0, 'text': 'the king'},
    {'context': 'to be or ', 'choices': ['not', 'the queen', 'king to'], 'answer': 2, 'text': 'to be or not to be'},
    {'context': 'the queen ', 'choices': ['says', 'be', 'not to'], 'answer': 1, 'text': 'says the queen'}]
TASKS = {
    'choices': {'output_type': 'multiple_choice', 'doc_to_text': '{{context}}', 'doc_to_choice': '{{choices}}',
                'doc_to_target': '{{answer}}', 'target_delimiter': '', 'metric_list': [{'metric': 'acc'}]},
    'whole': {'output_type': 'loglikelihood_rolling', 'doc_to_text': '', 'doc_to_target': '{{text}}',
              'metric_list': [{'metric': 'bits_per_byte'}]},
    'written': {'output_type': 'generate_until', 'doc_to_text': '{{context}}', 'doc_to_target': '{{text}}',
                'generation_kwargs': {'until': ['q'], 'max_gen_toks': 6}, 'metric_list': [{'metric': 'exact_match'}]}}


@pytest.fixture(scope='module', autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')
        yield


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A run folder with a checkpoint, a model of the library's, and task files."""
    root = tmp_path_factory.mktemp('harness')
    vocabulary = character_vocabulary(TEXT)
    save_model(root / 'run' / 'ckpt_best.pt', vocabulary, model_over(vocabulary, block_size=40))
    save_tiny('bert', root / 'bert')
    (root / 'tasks').mkdir()
    (root / 'documents.jsonl').write_text(''.join(json.dumps(document) + '\n' for document in DOCUMENTS))
    for name, task in TASKS.items():
        data = {'dataset_path': 'json', 'test_split': 'test', 'metadata': {'version': 1}, 'dataset_kwargs': {
            'data_files': {'test': str(root / 'documents.jsonl')}, 'cache_dir': str(root / 'cache')}}
        (root / 'tasks' / f'{name}.yaml').write_text(json.dumps({'task': name, **data, **task}))  # YAML holds JSON
    return root


def evaluate(place, arguments, tasks=tuple(TASKS), batch_size=5):
    """What the harness finds, and the answers of the model by task: those of a document after those before it."""
    found = lm_eval.simple_evaluate(
        model='masked_diffusion', model_args=arguments, tasks=list(tasks), batch_size=batch_size, device='cpu',
        task_manager=TaskManager(include_path=str(place / 'tasks'), include_defaults=False), bootstrap_iters=0)
    answers = {name: [answer for sample in found['samples'][name] for answer in sample['filtered_resps']]
               for name in tasks}
    return found, answers


def models(place):
    return {'checkpoint': f'out_dir={place / "run"}', 'bert': f'model={place / "bert"}'}


def doubled(place, which):
    """The model with weights in float64, and its vocabulary, read apart from the harness's way."""
    if which == 'bert':
        base = load_pretrained(Source(str(place / 'bert')), torch.device('cpu'))
        return base.model.double(), base.vocabulary, base.vocabulary.allowed
    vocabulary = character_vocabulary(TEXT)
    return (model_over(vocabulary, block_size=40).double(), vocabulary,
            torch.arange(vocabulary.size) < vocabulary.base_size)


def one_by_one(place, which, context, continuation):
    """log p(continuation | context) from left to right, one call a token, the softmax in float64."""
    model, vocabulary, allowed = doubled(place, which)
    given, asked = vocabulary.encode(context) if context else [], vocabulary.encode(continuation)
    shown, total, greedy = [*given, *[vocabulary.mask_token_id] * len(asked)], 0.0, True
    for at, token in enumerate(asked, len(given)):
        with torch.no_grad():
            logits = model(torch.tensor([shown])).logits[0, at].masked_fill(~allowed, -math.inf)
        total += logits.log_softmax(-1)[token].item()
        greedy &= logits.argmax().item() == token
        shown[at] = token
    return total, greedy


@pytest.mark.parametrize('which', ['checkpoint', 'bert'])
def test_the_harness_gets_the_exact_likelihood(place, which):
    found, answers = evaluate(place, models(place)[which] + ',policy=left_to_right', ('choices', 'whole'))
    pairs = [(document['context'].rstrip() if which == 'bert' else document['context'], choice)
             for document in DOCUMENTS for choice in document['choices']]
    expected = [one_by_one(place, which, *pair) for pair in pairs]
    assert [answer[0] for answer in answers['choices']] == pytest.approx([one[0] for one in expected], abs=2e-5)
    assert [answer[1] for answer in answers['choices']] == [one[1] for one in expected]
    whole = [one_by_one(place, which, '', document['text'])[0] for document in DOCUMENTS]
    assert answers['whole'] == pytest.approx(whole, abs=2e-5)
    best = [max(range(3), key=lambda choice: expected[3 * number + choice][0]) for number in range(3)]
    right = sum(one == document['answer'] for one, document in zip(best, DOCUMENTS))
    assert found['results']['choices']['acc,none'] == pytest.approx(right / 3)
    size = sum(len(document['text']) for document in DOCUMENTS)
    assert found['results']['whole']['bits_per_byte,none'] == pytest.approx(-sum(whole) / size / math.log(2), abs=1e-5)
    assert found['config']['policy'] == 'left_to_right' and found['config']['measure'] == 'likelihood'


@pytest.mark.parametrize('which', ['checkpoint', 'bert'])
@pytest.mark.parametrize('options', [',policy=margin,trunk_calls=2', ',measure=nelbo,draws=7'])
def test_one_at_a_time_gives_the_numbers_of_five_at_a_time(place, which, options):
    arguments = models(place)[which] + options
    (_, together), (_, alone) = evaluate(place, arguments), evaluate(place, arguments, batch_size=1)
    assert [one[0] for one in together['choices']] == pytest.approx([one[0] for one in alone['choices']], abs=1e-5)
    assert [one[1] for one in together['choices']] == [one[1] for one in alone['choices']]
    assert together['whole'] == pytest.approx(alone['whole'], abs=1e-5)
    assert together['written'] == alone['written']
    assert all('q' not in text and len(text) < 60 for text in together['written'])
    assert any(together['written'])


def test_what_the_model_cannot_do_is_told(place):
    with pytest.raises(UserError, match='max_batch_size was given'):
        language_model.MaskedDiffusionLM(out_dir=str(place / 'run'), max_batch_size=8)
    with pytest.raises(UserError, match='--out_dri.*no such option; did you mean'):
        language_model.MaskedDiffusionLM(out_dri='x')
    with pytest.raises(UserError, match='generation_kwargs name top_p, but of them this model knows until'):
        language_model.writing_of({'until': 'a', 'top_p': 0.9})
    with pytest.raises(UserError, match='0 tokens at temperature 0'):
        language_model.writing_of({'max_gen_toks': 0})
    assert language_model.writing_of({'until': ['a'], 'do_sample': True, 'temperature': 0.7, 'max_gen_toks': 9}) == \
        (('a',), 9, 0.7)
    assert language_model.writing_of({'temperature': 0.7, 'do_sample': False}) == ((), 256, 0.0)


def command(place, *arguments):
    return subprocess.run([sys.executable, '-m', 'core.evaluation.harness', 'run', '--model', 'masked_diffusion',
                           '--tasks', 'choices', '--include_path', str(place / 'tasks'), '--device', 'cpu', *arguments],
                          cwd=ROOT, env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(place / 'home')},
                          capture_output=True, text=True)


def test_the_command(place):
    found = command(place, '--model_args', f'out_dir={place / "run"},policy=left_to_right,trunk_calls=2')
    assert found.returncode == 0, found.stderr
    assert '|choices|' in found.stdout and 'acc' in found.stdout
    refused = command(place, '--model_args', f'out_dir={place / "run"},policy=magrin')
    assert refused.returncode == 2 and "did you mean 'margin'?" in refused.stderr + refused.stdout
    assert 'Traceback' not in refused.stderr
