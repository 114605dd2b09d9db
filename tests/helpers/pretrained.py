"""Tiny models in Hugging Face's form, made on the spot with random weights; for tests that need `transformers`."""

from pathlib import Path

import torch

WORDS = ('the', 'king', 'queen', 'says', 'to', 'be', 'or', 'not', ',', '.', '##s', 'a')
RESIDUES = 'LAGVSERTIDPKQNFYMHWCXBUZO.-'
TEXTS = {'bert': 'the king says to be or not', 'roberta': 'the king says: to be', 'modernbert': 'the queen, the king',
         'esm': 'MKTAYIAKQRQISF', 'qwen2': 'to be or not to be'}


def save_byte_level(folder: Path, frame: tuple[str, str] | None, mask: str, names_mask: bool = True) -> int:
    """A byte-level tokenizer of 256 bytes and a few merges; how many ids it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ['<pad>', '<unk>', mask, *(frame or ())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(['the king and the queen say to be or not to be'] * 3, trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    if frame is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f'{frame[0]} $A {frame[1]}', special_tokens=[(one, tokenizer.token_to_id(one)) for one in frame])
    named = {'mask_token': mask} if names_mask else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>', unk_token='<unk>', **named).save_pretrained(
        folder)
    return tokenizer.get_vocab_size()


def save_tiny(kind: str, folder: Path, **changes: object) -> Path:
    """A model of one of five architectures with its tokenizer, in `folder`."""
    import transformers as library

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 24}
    if kind == 'bert':
        vocabulary = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS]
        (folder / 'vocab.txt').write_text('\n'.join(vocabulary) + '\n')
        config = library.BertConfig(**{**sizes, 'vocab_size': len(vocabulary) + 3, 'max_position_embeddings': 24,
                                       **changes})
        model = library.BertForMaskedLM(config)
    elif kind == 'roberta':
        size = save_byte_level(folder, ('<s>', '</s>'), '<mask>')
        model = library.RobertaForMaskedLM(library.RobertaConfig(**{
            **sizes, 'vocab_size': size, 'max_position_embeddings': 42, 'pad_token_id': 0, **changes}))
    elif kind == 'modernbert':
        size = save_byte_level(folder, ('[CLS]', '[SEP]'), '[MASK]')
        model = library.ModernBertForMaskedLM(library.ModernBertConfig(**{
            **sizes, 'vocab_size': size, 'max_position_embeddings': 64, 'pad_token_id': 0, 'cls_token_id': 3,
            'sep_token_id': 4, 'bos_token_id': 3, 'eos_token_id': 4, 'local_attention': 8, 'decoder_bias': True,
            **changes}))
    elif kind == 'esm':
        vocabulary = ['<cls>', '<pad>', '<eos>', '<unk>', *RESIDUES, '<null_1>', '<mask>']
        (folder / 'vocab.txt').write_text('\n'.join(vocabulary) + '\n')
        library.EsmTokenizer(str(folder / 'vocab.txt')).save_pretrained(folder)
        model = library.EsmForMaskedLM(library.EsmConfig(**{
            **sizes, 'vocab_size': len(vocabulary), 'max_position_embeddings': 40, 'pad_token_id': 1,
            'mask_token_id': len(vocabulary) - 1, 'position_embedding_type': 'rotary', 'token_dropout': True,
            **changes}))
    else:
        size = save_byte_level(folder, None, '<|mask|>', names_mask=False)
        model = library.Qwen2ForCausalLM(library.Qwen2Config(**{
            **sizes, 'vocab_size': size + 5, 'num_key_value_heads': 1, 'max_position_embeddings': 32,
            'bos_token_id': None, 'eos_token_id': None, **changes}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder
