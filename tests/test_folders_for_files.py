"""A folder where an option means a file: one sentence that names it, before any work."""

import dataclasses

import pytest

import bench
import evaluate
import sample
import train
from core.common.errors import UserError
from helpers.toys import model_over, save_model

SCRIPTS = {train: train.TrainConfig, sample: sample.SampleConfig, evaluate: evaluate.EvaluateConfig,
           bench: bench.BenchConfig}
FOLDERS = {'out_dir', 'data_dir'}
OF_PRETRAINED = {'text_file', 'sampler_head'}  # read with --model only, which needs transformers
WITH = {  # further options that an option needs before it is read
    (train, 'corruption_checkpoint'): ['--training_type=remasking', '--remasking_corruption=model', '--dataset=tiny'],
    (train, 'init_from_checkpoint'): ['--dataset=tiny'],
    (train, 'judge_checkpoint_name'): ['--training_type=grpo', '--reward=judge', '--dataset=tiny',
                                       '--init_from_checkpoint=out/ckpt_best.pt', '--prompt_length=4'],
    (sample, 'judge_checkpoint_name'): ['--quality_metric=judge'],
    (evaluate, 'remasking_checkpoint_name'): ['--measure=errors'],
    (evaluate, 'checkpoints'): ['--measure=arena'],
    (evaluate, 'reference_checkpoint'): ['--measure=quality'],
    (evaluate, 'causal_checkpoint'): ['--measure=curves', '--reference_checkpoint=out/ckpt_best.pt']}
OPTIONS = [(script, one.name) for script, options in SCRIPTS.items() for one in dataclasses.fields(options)
           if one.metadata.get('path') and one.name not in FOLDERS | OF_PRETRAINED]


@pytest.mark.parametrize('script, name', OPTIONS, ids=lambda value: getattr(value, '__name__', value))
def test_a_folder_where_a_file_is_meant_is_one_sentence(small_corpus, data_here, script, name):
    save_model(data_here.parent / 'out' / 'ckpt_best.pt', small_corpus.vocabulary, model_over(small_corpus.vocabulary),
               config={'dataset': 'tiny'})
    (data_here.parent / 'a_folder').mkdir()
    device = [] if name in ('from_json', 'report') else ['--device=cpu']
    with pytest.raises(UserError, match='a_folder') as caught:
        script.main([f'--{name}=a_folder', *device, *WITH.get((script, name), [])])
    assert sum('a_folder' in line for line in str(caught.value).split('\n')) == 1
    assert not list((data_here.parent / 'a_folder').iterdir())


@pytest.mark.parametrize('option', ['start_text', 'infill_text'])
def test_a_folder_as_a_text_is_one_sentence(small_corpus, data_here, option):
    (data_here.parent / 'a_folder').mkdir()
    with pytest.raises(UserError, match='a_folder, but the file cannot be read'):
        sample.main([f'--{option}=@a_folder'])
