"""sample.py from the command line: options, files, and messages when something is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import core.sampling.run
from configurator import configure
from core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from core.checkpoints.heads import started_heads
from core.common.errors import UserError
from core.data.vocabulary import Vocabulary
from core.noise import SCHEDULES
from core.sampling.options import SampleConfig
from core.sampling.policies import POLICIES
from core.sampling.policy_options import option_problems, policy_help, remasking_levels
from core.sampling.result import TextStatistics
from core.sampling.run import run_sampling
from helpers.sampling import VOCABULARY, sample, write_checkpoint
from helpers.toys import model_over, save_model
from model import GPTConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    write_checkpoint(folder / 'ckpt_best.pt', add_sampler_head=True, add_critic_head=True)
    write_checkpoint(folder / 'plain.pt')
    write_checkpoint(folder / 'young.pt', iteration=5, add_sampler_head=True, add_critic_head=True,
                     start_sampler_iteration=5, start_critic_iteration=9)
    write_checkpoint(folder / 'causal.pt', kind='causal', attention_type='causal')
    write_checkpoint(folder / 'judge.pt', kind='judge', mode='sequence_scorer', cls_token_id=VOCABULARY.cls_token_id)
    return folder


def problems(*arguments):
    configuration = configure(SampleConfig, list(arguments))
    return '\n'.join(option_problems(configuration.config, configuration.explicit))


def test_the_script_prints_texts_scores_and_times(folder):
    done = subprocess.run([sys.executable, 'sample.py', f'--out_dir={folder}', '--device=cpu', '--num_samples=2',
                           '--sampling_method=diffusion', '--diffusion_iterations=4', '--seed_text=ab'], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for part in ('--- sample 1 (self-confidence -', '\nab', '28 tokens in', '4 trunk calls, 4 network calls',
                 'characters: ',
                 'patterns: ', 'trunk', 'remask', '8 groups'):
        assert part in done.stdout
    assert done.stderr == ''


def test_a_missing_checkpoint_names_the_command_that_makes_one(tmp_path):
    done = subprocess.run([sys.executable, 'sample.py', f'--out_dir={tmp_path}/none'], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 2 and 'python train.py' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize('arguments', [
    ['--sampling_method=sampler', '--iterations=1'],
    ['--sampling_method=multinomial', '--iterations=3'],
    ['--sampling_method=standard', '--max_new_tokens=9', '--start_text=ab', '--top_k=3', '--repetition_penalty=1.3'],
    ['--sampling_method=standard', '--checkpoint_name=causal.pt', '--max_new_tokens=30', '--start_text=ab'],
    ['--sequence_length=40', '--schedule_type=cosine', '--iterations=3', '--temperature=0', '--use_sampler_head=False'],
    ['--schedule_type=custom', '--masking_ratios=[0.9,0.5,0.1]', '--top_p=0.9', '--seed_placement=random',
     '--start_text=abc'],
    ['--schedule_mode=threshold', '--iterations=4', '--log_debug=True', '--use_verbose_logging=True'],
    ['--intelligent_remasking=False', '--checkpoint_name=plain.pt', '--iterations=3', '--quality_metric=none'],
])
def test_each_way_of_sampling_runs_and_ignores_the_batch_size(folder, arguments):
    first, _ = sample(folder, *arguments, '--num_samples=3')
    second, _ = sample(folder, *arguments, '--num_samples=3', '--batch_size=2')
    assert first.texts == second.texts and len(first.texts) == 3
    assert not any('_' in text for text in first.texts) and (first.tokens < VOCABULARY.base_size).all()


@pytest.mark.parametrize('name', POLICIES)
def test_each_policy_runs_by_its_name_and_ignores_the_batch_size(folder, name):
    arguments = [f'--sampling_policy={name}', '--block_length=5', '--start_text=ab', '--num_samples=3']
    if 'iterations' in POLICIES[name].options:
        arguments.append('--iterations=3')
    first, said = sample(folder, *arguments)
    assert sample(folder, *arguments, '--batch_size=2')[0].texts == first.texts and 'trunk calls' in said
    assert all(text.startswith('ab') and '_' not in text for text in first.texts)


def test_policies_in_time_follow_the_schedule_that_the_checkpoint_names(folder, monkeypatch):
    seen = []
    row = POLICIES['mdlm']
    monkeypatch.setitem(POLICIES, 'mdlm', row._replace(make=lambda **given: seen.append(given['schedule']) or
                                                       row.make(**given)))
    for name in ('ckpt_best.pt', 'cosine.pt'):
        if name == 'cosine.pt':
            checkpoint = load_checkpoint(folder / 'ckpt_best.pt')
            checkpoint.config['noise_schedule'] = 'cosine'
            save_checkpoint(folder / name, checkpoint.to_payload())
        sample(folder, '--sampling_policy=mdlm', '--iterations=3', f'--checkpoint_name={name}', '--num_samples=1')
    assert seen == [SCHEDULES['linear'], SCHEDULES['cosine']]


def test_help_lists_every_policy_in_one_line():
    lines = policy_help().splitlines()
    for name in POLICIES:
        assert sum(line.split()[0] == name for line in lines) == 1
    assert all(len(line) <= 120 for line in lines)


def test_samples_that_are_all_the_same_text_are_explained(folder):
    infill = ['--infill_text=ab___cd', '--num_samples=3', '--iterations=2', '--batch_size=2']
    result, said = sample(folder, *infill, '--temperature=0')
    assert len(set(result.texts)) == 1
    assert 'all 3 samples are the same text: at temperature 0 nothing is left to chance; raise --temperature' in said
    result, said = sample(folder, *infill, '--top_k=1', '--temperature=0.5')
    assert len(set(result.texts)) == 1 and 'every open position has one likely token at temperature 0.5, top_p 1.0 and top_k 1; raise' in said
    result, said = sample(folder, *infill, '--temperature=1.0')
    assert len(set(result.texts)) > 1 and 'the same text' not in said
    assert 'the same text' not in sample(folder, *infill, '--temperature=0', '--num_samples=1')[1]
    assert '1 trunk call, 1 network call, ' in sample(folder, '--iterations=1', '--num_samples=1')[1]


def test_infilling_and_json(folder, tmp_path):
    result, said = sample(folder, '--infill_text=ab##cd#', '--infill_char=#', '--iterations=3', '--end_ratio=0.5',
                          '--num_samples=2',
                          f'--save_json={tmp_path}/run.json', f'--output_file={tmp_path}/texts.txt')
    assert all(text[:2] == 'ab' and text[4:6] == 'cd' and len(text) == 7 for text in result.texts)
    saved = json.loads((tmp_path / 'run.json').read_text())
    assert saved['texts'] == result.texts and saved['trunk_calls'] == 3
    assert [step['event'] for step in saved['steps']][:3] == ['start', 'predict', 'remask']
    assert saved['steps'][0]['samples'][1]['changed'] == [] and saved['steps'][1]['samples'][1]['changed'] == [2, 3, 6]
    assert saved['steps'][-1]['samples'][0]['text'] == result.texts[0]
    assert (tmp_path / 'texts.txt').read_text() == '\n\n'.join(result.texts) + '\n'


def test_the_replay_page_holds_the_run_and_the_animation_shows_it(folder, tmp_path, capsys):
    plain, _ = sample(folder, '--iterations=3', '--num_samples=2')
    result, said = sample(folder, '--iterations=3', '--num_samples=2', f'--save_html={tmp_path}/run.html',
                          '--animate=True')
    assert result.texts == plain.texts and f'replay written to {tmp_path}/run.html' in said
    data = json.loads(re.search(r'id="trace">(.*?)</script>', (tmp_path / 'run.html').read_text(), re.S)[1])
    assert [frame['event'] for frame in data['samples'][1]['frames']] == ['predict', 'remask'] * 2 + ['predict']
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 6 and 'step 3 of 3' in shown[-1] and shown[-1].count(' 0% masked') == 1


def test_heads_that_had_not_begun_are_ignored_and_that_is_said(folder):
    result, said = sample(folder, '--checkpoint_name=young.pt', '--iterations=2', '--num_samples=1')
    assert 'the sampler head is ignored: its stage begins at iteration 5' in said and 'critic head is ignored' in said
    assert result.waves == 0 and result.network_calls == 2
    plain, _ = sample(folder, '--checkpoint_name=young.pt', '--iterations=2', '--num_samples=1',
                      '--use_sampler_head=False')
    assert plain.texts == result.texts
    with pytest.raises(UserError, match='sampler head is ignored'):
        sample(folder, '--checkpoint_name=young.pt', '--sampling_method=sampler')
    config = GPTConfig(add_sampler_head=True, mask_token_id=1, start_sampler_iteration=5)
    assert started_heads(config, 6)[0] and not started_heads(config, 5)[0]


def test_verbose_and_debug_lines(folder):
    _, said = sample(folder, '--use_verbose_logging=True', '--log_debug=True', '--iterations=3', '--num_samples=1')
    for part in ('100.0% masked', 'first preview', 'last preview', 'step 0 remask: 15 positions changed', 'never'):
        assert part in said


@pytest.mark.parametrize('arguments, words', [
    (['--sampling_method=multinomial', '--top_p=0.9'], 'top_p does not apply to sampling_method=multinomial'),
    (['--sampling_method=standard', '--iterations=5'], 'iterations does not apply'),
    (['--sampling_method=sampler', '--use_sampler_head=False'], 'sampling_method=diffusion'),
    (['--masking_ratios=[0.5]'], 'schedule_type=custom'),
    (['--schedule_type=custom'], 'masking_ratios is empty'),
    (['--schedule_type=custom', '--masking_ratios=[0.5,0.2]', '--iterations=2'], 'make 3 predictions'),
    (['--schedule_type=custom', '--masking_ratios=[1.5]'], 'holds 1.5'),
    (['--start_ratio=1.2'], 'start_ratio is 1.2'),
    (['--start_threshold=0.2'], 'schedule_mode=threshold'),
    (['--schedule_mode=threshold', '--start_ratio=0.5'], 'schedule_mode=ratio'),
    (['--infill_text=a_', '--start_text=b'], 'exclude each other'),
    (['--max_new_tokens=3', '--sequence_length=8'], 'exclude each other'),
    (['--seed_placement=random'], 'start_text'),
    (['--temperature=-1'], 'temperature is -1'),
    (['--num_samples=0'], 'num_samples is 0'),
    (['--sampling_policy=maskgti'], "did you mean 'maskgit'?"),
    (['--sampling_policy=mdlm', '--start_ratio=0.5'], 'start_ratio does not apply to sampling_policy=mdlm'),
    (['--sampling_policy=first_hitting', '--iterations=9'], 'iterations does not apply to sampling_policy=first_hit'),
    (['--entropy_bound=1'], 'take a policy that has it: entropy_bounded'),
    (['--sampling_method=multinomial', '--sampling_policy=mdlm'], 'sampling_policy does not apply'),
    (['--sampling_method=standard', '--block_length=4'], 'block_length does not apply'),
    (['--block_length=0'], 'block_length is 0'),
    (['--sampling_policy=remdm_cap', '--remdm_eta=1.5'], 'remdm_eta is 1.5, but must lie in [0, 1]'),
    (['--sampling_policy=remdm_loop', '--loop_on=0.3', '--loop_off=0.4'], 'loop_off is 0.4, but must not exceed'),
    (['--sampling_policy=remdm_loop', '--loop_alpha=1'], 'loop_alpha is 1.0, but must lie between 0 and 1'),
    (['--sampling_policy=maskgit', '--choice_temperature=-1'], 'choice_temperature is -1.0'),
    (['--sampling_policy=fast_dllm_factor', '--parallel_factor=0'], 'parallel_factor is 0.0'),
])
def test_options_that_do_not_apply_or_fit_are_named(arguments, words):
    assert words in problems(*arguments)


def test_defaults_are_never_a_problem_and_all_problems_come_together():
    for method in ('diffusion', 'sampler', 'multinomial', 'standard'):
        assert problems(f'--sampling_method={method}') == ''
    assert len(problems('--sampling_method=standard', '--iterations=0', '--top_p=2').splitlines()) == 3


@pytest.mark.parametrize('arguments, words', [
    (['--start_text=' + 'a' * 17], '17 tokens, but the sequence holds 16'),
    (['--start_text=xyz'], 'x'),
    (['--checkpoint_name=plain.pt', '--sampling_method=sampler'], 'no sampler head'),
    (['--checkpoint_name=plain.pt', '--schedule_mode=threshold', '--intelligent_remasking=False'], 'threshold'),
    (['--checkpoint_name=causal.pt'], 'sampling_method=standard'),
    (['--checkpoint_name=plain.pt', '--sampling_policy=p2_critic'], 'needs a critic, but the checkpoint has none'),
    (['--checkpoint_name=young.pt', '--sampling_policy=token_critic'], 'needs a critic, but the critic head is'),
    (['--checkpoint_name=causal.pt', '--sampling_method=standard', '--infill_text=a_'], 'bidirectional'),
    (['--checkpoint_name=judge.pt'], 'judge'),
    (['--save_json=/nowhere/at/all.json'], 'does not exist'),
])
def test_what_does_not_suit_the_checkpoint_is_one_sentence(folder, arguments, words):
    with pytest.raises(UserError, match=words):
        sample(folder, *arguments)


def test_iterations_count_predictions():
    config = configure(SampleConfig, ['--iterations=4', '--start_ratio=0.9', '--end_ratio=0.3']).config
    assert remasking_levels(config) == pytest.approx([0.9, 0.6, 0.3])
    assert remasking_levels(configure(SampleConfig, ['--iterations=1']).config) == []
    custom = configure(SampleConfig, ['--schedule_type=custom', '--masking_ratios=[0.9,0.1]']).config
    assert remasking_levels(custom) == [0.9, 0.1]


def test_character_statistics():
    counted = TextStatistics()
    counted.add(['aab'])
    counted.add(['a'])
    assert counted.characters() == [('a', 0.75), ('b', 0.25)] and counted.patterns() == []
    counted = TextStatistics()
    counted.add(['abcabc', 'abc'])
    assert counted.patterns() == [('abc', 3)]


def test_another_seed_gives_other_texts(folder):
    texts = [sample(folder, '--iterations=2', f'--seed={seed}', '--num_samples=2')[0].texts for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# Block models ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def block_folder(tmp_path_factory):
    """A block model of lengths 4 and 16 with a head that writes from left to right, and a plain one of length 4."""
    folder = tmp_path_factory.mktemp('blocks')
    vocabulary = Vocabulary('characters', tuple('abc \n'))
    head = {'add_sampler_head': True, 'sampler_context_left': 3, 'sampler_context_right': 0,
            'sampler_order': 'left_to_right', 'sampler_gate': True}
    save_model(folder / 'rows.pt', vocabulary, model_over(vocabulary, add_sampler_head=True, sampler_kind='layer'))
    save_model(folder / 'whole.pt', vocabulary, model_over(vocabulary, add_sampler_head=True))
    for name, lengths, changes in (('ckpt_best.pt', (4, 16), head), ('plain.pt', (4,), {}), ('mixture.pt', (1, 4), head),
                                   ('every.pt', (1, 4, 16), head)):
        model = model_over(vocabulary, attention_type='block', block_length=lengths, **changes)
        save_model(folder / name, vocabulary, model, kind='block')
    return folder


def sampled(folder, *arguments):
    said = []
    configuration = configure(SampleConfig, [f'--out_dir={folder}', '--num_samples=2', '--device=cpu', *arguments])
    return run_sampling(configuration.config, configuration.explicit, said.append), said


def test_a_block_model_takes_one_call_a_block(block_folder):
    result, said = sampled(block_folder, '--max_new_tokens=21', '--start_text=abc')
    assert result.trunk_calls == 6 and 'blocks of 4, iterations=1 for each' in said
    assert all(batch.texts[0].startswith('abc') for batch in result.batches)
    result, said = sampled(block_folder, '--checkpoint_name=plain.pt', '--sequence_length=16')
    assert result.trunk_calls == 8 and 'blocks of 4, iterations=2 for each' in said
    result, _ = sampled(block_folder, '--sampling_method=standard', '--sequence_length=16')
    assert result.trunk_calls == 16


def test_a_mixture_reads_both_sides_in_a_window(block_folder):
    result, _ = sampled(block_folder, '--infill_text=ab____ca', '--iterations=3')
    assert all(text.startswith('ab') and text.endswith('ca') for batch in result.batches for text in batch.texts)


@pytest.mark.parametrize('arguments, words', [
    (('--block_length=5',), ['block_length is 5', 'block lengths 4, 16']),
    (('--checkpoint_name=plain.pt', '--infill_text=ab__c'), ['sees nothing after', 'block_length=16']),
    (('--checkpoint_name=plain.pt', '--start_text=a', '--seed_placement=random'), ['seed_placement=random']),
    (('--sampling_method=multinomial',), ['multinomial', '--block_length=16']),
    (('--remasking_checkpoint_name=x.pt', '--block_length=4'), ['remasking_checkpoint_name', 'whole texts']),
    (('--verify_drafts=True',), ['verify_drafts', 'block lengths 4, 16', '--block_length=[1,8]']),
    (('--checkpoint_name=mixture.pt', '--verify_drafts=True', '--repetition_penalty=1.2'), ['repetition_penalty']),
    (('--checkpoint_name=mixture.pt', '--verify_drafts=True', '--iterations=3'), ['iterations does not apply']),
    (('--checkpoint_name=mixture.pt', '--verify_drafts=True', '--block_length=1'), ['blocks of more than one token']),
    (('--checkpoint_name=every.pt', '--verify_drafts=True', '--infill_text=ab__c'), ['leave out infill_text']),
    (('--checkpoint_name=every.pt', '--verify_drafts=True', '--block_length=16'), ['less than the window (16)']),
    (('--checkpoint_name=plain.pt', '--verify_drafts=True'), ['block_length=4', 'sampler head']),
    (('--checkpoint_name=whole.pt', '--verify_drafts=True'), ['reads rows', '--sampler_kind=layer']),
    (('--checkpoint_name=rows.pt', '--verify_drafts=True', '--repetition_penalty=1.2', '--use_sampler_head=False'),
     ['repetition_penalty does not apply', 'use_sampler_head=False does not apply'])])
def test_what_a_block_model_cannot_do_is_said(block_folder, arguments, words):
    with pytest.raises(UserError) as caught:
        sampled(block_folder, *arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_compile_without_a_compiler_that_works_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr('core.sampling.loading.compile_problem', lambda device: 'there is no C++ compiler')
    with pytest.raises(UserError, match='compile is True, but there is no C\\+\\+ compiler; or leave compile out'):
        config = configure(SampleConfig, [f'--out_dir={folder}', '--device=cpu', '--compile=True']).config
        core.sampling.run.run_sampling(config, {'compile': 'command line'})


def test_cuda_graphs_are_refused_without_a_cuda_gpu(folder):
    config = configure(SampleConfig, [f'--out_dir={folder}', '--device=cpu', '--cuda_graphs=True'])
    with pytest.raises(UserError, match='cuda_graphs is True, but the device is cpu; leave it out'):
        core.sampling.run.run_sampling(config.config, config.explicit)


def test_drafts_are_verified(block_folder):
    result, said = sampled(block_folder, '--checkpoint_name=mixture.pt', '--verify_drafts=True', '--start_text=ab',
                           '--max_new_tokens=20', '--quality_metric=none')
    assert all(text.startswith('ab') and len(text) == 22 for batch in result.batches for text in batch.texts)
    assert result.trunk_calls > 0 and result.trunk_calls < 2 * 22


def test_a_head_that_reads_rows_writes_and_verifies(block_folder):
    """One trunk call of 16 positions: 16 draws of the head, or a few calls of it."""
    def written(*more):
        return sampled(block_folder, '--checkpoint_name=rows.pt', '--sampling_policy=strided', '--iterations=1',
                       '--quality_metric=none', *more)[0]

    drawn, verified = written(), written('--verify_drafts=True')
    assert drawn.trunk_calls == verified.trunk_calls == 1 and drawn.waves == 16 and 1 <= verified.waves <= 17
    assert all(len(text) == 16 for result in (drawn, verified) for batch in result.batches for text in batch.texts)
