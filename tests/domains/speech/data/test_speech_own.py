"""The user's own clips: tables, folders and published layouts, their splits, and one clear error for each fault."""

from __future__ import annotations

import json
import warnings

import pytest

from common.errors import GraftError
from domains.speech.data import FLEURS, AudioFolder, CommonVoice, LabelledAudio, LibriSpeech, Manifest

WORDS = ["red", "green", "blue", "black", "white", "pink", "brown", "grey", "gold", "lime", "teal", "plum"]


def opened(data):
    data.setup()
    return data


def texts(data, split):
    return {record.text for record in data.records(split)}


def speakers(data, split):
    return {record.speaker for record in data.records(split)}


def disjoint(data, of):
    parts = [of(data, split) for split in ("train", "val", "test")]
    return all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def manifest(clip, table, copies=2, speaker=lambda n: ""):
    lines = [
        f"{clip(f'{n}-{word}.wav', 200 + 10 * place + n)},{word.title()}!,{speaker(n)}"
        for n in range(copies)
        for place, word in enumerate(WORDS)
    ]
    return table("path,text,speaker", *lines)


def test_a_manifest_is_split_by_text(clip, table):
    data = opened(Manifest(manifest(clip, table), language="en"))
    assert disjoint(data, texts)
    assert sum(data.facts.counts.values()) == 24
    assert data.facts.counts["train"] >= 14
    assert (data.facts.language, data.facts.rate, data.facts.normalizer) == ("en", 16_000, "lower")
    assert data.records("train")[0].text in WORDS
    assert set("".join(texts(data, "train"))) == set(data.facts.characters)
    assert data.facts.transcripts == {"words": 24, "distinct": 12, "digits": 0, "longest": 5}
    assert data.facts.max_seconds == pytest.approx(0.5)
    assert data.facts.short


def test_a_split_depends_on_texts_alone(clip, table, tmp_path):
    path = manifest(clip, table)
    first = opened(Manifest(path))
    lines = (tmp_path / "clips.csv").read_text().splitlines()
    table(lines[0], *reversed(lines[1:]))
    second = opened(Manifest(path, seed=7))
    assert first.facts.digest == second.facts.digest
    assert [r.id for r in first.records("test")] == [r.id for r in second.records("test")]


def test_speakers_and_texts_stay_on_one_side(clip, table):
    with pytest.warns(UserWarning, match="left out .* clips whose text stands in another split too"):
        data = opened(Manifest(manifest(clip, table, 6, lambda n: f"voice {n}"), val_fraction=0.2))
    assert disjoint(data, texts)
    assert disjoint(data, speakers)
    lost = data.facts.left_out["text stands in another split"]
    assert sum(data.facts.counts.values()) + lost == 72
    assert data.facts.speakers == {split: len(speakers(data, split)) for split in ("train", "val", "test")}


def test_given_splits_are_kept_and_a_test_text_leaves_training(clip, table):
    rows = [f"{clip('a.wav')},one,train", f"{clip('b.wav')},two,train", f"{clip('c.wav')},Two.,test"]
    rows += [f"{clip('d.wav')},three,dev"]
    with pytest.warns(UserWarning, match="left out 1 of 4 clips"):
        data = opened(Manifest(table("path,text,split", *rows)))
    assert [texts(data, split) for split in ("train", "val", "test")] == [{"one"}, {"three"}, {"two"}]


def test_missing_splits_are_cut_out_of_train(clip, table):
    rows = [f"{clip(f'{word}.wav')},{word},{'test' if word == 'red' else ''}" for word in WORDS]
    data = opened(Manifest(table("path,text,split", *rows)))
    assert texts(data, "test") == {"red"}
    assert data.facts.counts["val"] >= 1


def test_json_lines_and_stretches(clip, table):
    clip("long.wav", seconds=6.0)
    rows = [{"path": "long.wav", "text": word, "start": n / 2, "end": n / 2 + 0.4} for n, word in enumerate(WORDS)]
    data = opened(Manifest(table(*map(json.dumps, rows), name="clips.jsonl")))
    batch = next(iter(data.test_dataloader()))
    assert set(batch.lengths.tolist()) == {6_400}
    assert data.records("train")[0].seconds == pytest.approx(0.4)


FAULTS = {
    "no such file": (["path,text", "gone.wav,red"], "There is no file"),
    "an empty text": (["path,text", "a.wav,"], "line 2: the text is empty"),
    "an empty path": (["path,text", ",red"], "line 2: the path is empty"),
    "only signs": (
        ["path,text,split", "a.wav,...,train", "b.wav,x,val", "c.wav,y,test"],
        "nothing is left of the text",
    ),
    "a clip twice": (["path,text", "a.wav,red", "a.wav,blue"], "line 3: the clip 'a.wav' stands in line 2 already"),
    "an id twice": (["id,path,text", "1,a.wav,red", "1,b.wav,blue"], "the clip '1' stands in line 2 already"),
    "a wrong split": (["path,text,split", "a.wav,red,trian"], "Unknown split 'trian'. Did you mean 'train'"),
    "a wrong start": (["path,text,start", "a.wav,red,soon"], "start is 'soon'"),
    "behind the end": (["path,text,start,end", "a.wav,red,0.2,5"], "the stretch from 0.2 to 5 s is not in it"),
    "a wrong rate": (["path,text,rate", "a.wav,red,8000"], "declared as 8000 Hz and its header says 16000 Hz"),
    "no column": (["file,text", "a.wav,red"], "has no 'path'"),
    "nothing": ([""], "lists no clips"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_clear_error_for_each_fault(clip, table, fault):
    for name in ("a.wav", "b.wav", "c.wav"):
        clip(name)
    lines, said = FAULTS[fault]
    with pytest.raises(GraftError, match=said) as caught:
        opened(Manifest(table(*lines)))
    assert "\n" not in str(caught.value)


def test_rare_signs_of_line_ends_belong_to_a_text(clip, table):
    rows = [f'{clip(f"{word}.wav")},"{word}\u2028hat, new"' for word in WORDS]
    data = opened(Manifest(table("path,text", *rows)))
    assert "".join(sorted(texts(data, "test"))[0]).endswith("hat new")
    assert sum(data.facts.counts.values()) == len(WORDS)


def test_no_manifest_and_no_json(tmp_path, table):
    with pytest.raises(GraftError, match="There is no file"):
        opened(Manifest(str(tmp_path / "none.csv")))
    with pytest.raises(GraftError, match="line 1 is no JSON"):
        opened(Manifest(table("path,text", name="clips.jsonl")))


def test_long_clips_are_refused_or_counted(clip, table):
    rows = [f"{clip(f'{word}.wav', seconds=1.5 if word == 'red' else 0.5)},{word}" for word in WORDS]
    path = table("path,text", *rows)
    with pytest.raises(GraftError, match=r"'red.wav' lasts 1.5 s, longer than max_seconds 1:"):
        opened(Manifest(path, max_seconds=1.0))
    data = opened(Manifest(path, max_seconds=1.0, long="leave_out"))
    assert data.facts.left_out == {"longer than 1 s": 1}


def test_unreadable_files_up_to_a_share_are_named_and_counted(clip, table, tmp_path):
    rows = [f"{clip(f'{word}.wav')},{word}" for word in WORDS]
    (tmp_path / "red.wav").write_bytes(b"no sound")
    path = table("path,text", *rows)
    with pytest.raises(GraftError, match=r"1 of 12 clips cannot be used, more than max_bad 0.01 .*red\.wav"):
        opened(Manifest(path))
    with pytest.warns(UserWarning, match=r"clip 1 that is left out: .*line 2: Cannot read .*red\.wav"):
        data = opened(Manifest(path, max_bad=0.1))
    assert data.facts.skipped == 1
    assert sum(data.facts.counts.values()) == 11


def test_a_text_too_long_for_its_sound_hints_at_a_wrong_rate(clip, table):
    rows = [f"{clip(f'{word}.wav', seconds=0.06)},{word} and white" for word in WORDS]
    with pytest.warns(UserWarning, match="12 of 12 texts have more than 35 characters a second"):
        opened(Manifest(table("path,text", *rows)))


def test_labels_are_split_by_speaker_and_the_card_is_filled(clip, table):
    rows = [
        f"{clip(f'{voice}-{n}-{label}.wav', pitch + voice)},{label},{voice}"
        for voice in range(10)
        for n in range(2)
        for label, pitch in (("low", 300), ("high", 3000))
    ]
    data = opened(LabelledAudio(table("path,label,speaker", *rows)))
    assert disjoint(data, speakers)
    assert data.names == ("high", "low")
    # Pitch alone is the class here, and a probe on mel statistics shows it.
    assert data.facts.confound == {"mel_statistics": 1.0, "majority": 0.5}
    batch = next(iter(data.test_dataloader()))
    expected = [data.names.index(data.records("test")[i].label) for i in batch.index.tolist()]
    assert batch.target.tolist() == expected
    assert set(batch.text) == {""}


def test_labels_without_speakers_keep_their_shares(clip, table):
    rows = [
        f"{clip(f'{n}-{label}.wav', pitch + n)},{label}"
        for n in range(10)
        for label, pitch in (("a", 300), ("b", 3000))
    ]
    data = opened(LabelledAudio(table("path,label", *rows)))
    assert {label: sum(r.label == label for r in data.records("test")) for label in data.names} == {"a": 2, "b": 2}


def test_too_few_speakers_or_labels(clip, table):
    rows = [f"{clip(f'{word}.wav')},{word},{word}" for word in WORDS[:2]]
    with pytest.raises(GraftError, match="2 different speakers or texts cannot be cut"):
        opened(LabelledAudio(table("path,label,speaker", *rows)))
    rows = [f"{clip(f'{word}.wav', 200 + 30 * n)},same" for n, word in enumerate(WORDS)]
    with pytest.raises(GraftError, match="needs at least 2 classes"):
        opened(LabelledAudio(table("path,label", *rows)))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_audio_folder(clip, table, tmp_path, ending):
    for side, words in (("train", WORDS[:8]), ("validation", WORDS[8:10]), ("test", WORDS[10:])):
        rows = [{"file_name": f"{word}.wav", "transcription": word} for word in words]
        for word in words:
            clip(f"{side}/{word}.wav")
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        lines = [*map(json.dumps, rows)] if ending == "jsonl" else lines
        table(*lines, name=f"{side}/metadata.{ending}")
    data = opened(AudioFolder(str(tmp_path)))
    assert (texts(data, "train"), texts(data, "test")) == (set(WORDS[:8]), set(WORDS[10:]))
    assert len(next(iter(data.val_dataloader())).text) == 2


def test_audio_folder_with_one_table_names_its_splits_by_folders(clip, table, tmp_path):
    names = [f"{'train' if n < 8 else 'test' if n < 10 else 'val'}/{word}.wav" for n, word in enumerate(WORDS)]
    rows = [f"{clip(name)},{word}" for name, word in zip(names, WORDS, strict=True)]
    table("file_name,text", *rows, name="metadata.csv")
    assert opened(AudioFolder(str(tmp_path))).facts.counts == {"train": 8, "val": 2, "test": 2}
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(GraftError, match=r"holds no metadata\.csv"):
        opened(AudioFolder(str(tmp_path)))


def test_librispeech(clip, table, tmp_path):
    for part, speaker in (("train-clean-100", 1), ("dev-clean", 2), ("test-clean", 3)):
        names = [f"{speaker}-7-{n:04d}" for n in range(2)]
        for name in names:
            clip(f"{part}/{speaker}/7/{name}.flac")
        table(*(f"{name} SAID BY {name}" for name in names), name=f"{part}/{speaker}/7/{speaker}-7.trans.txt")
    data = opened(LibriSpeech(str(tmp_path)))
    assert data.facts.counts == {"train": 2, "val": 2, "test": 2}
    record = data.records("test")[0]
    assert (record.id, record.text, record.speaker) == ("3-7-0000", "said by 3 7 0000", "3")
    with pytest.raises(GraftError, match="correct root or train"):
        opened(LibriSpeech(str(tmp_path), train="train-other-500"))


def test_common_voice_and_fleurs(clip, table, tmp_path):
    for number, (side, part) in enumerate((("train", "train"), ("dev", "dev"), ("test", "test"))):
        words = WORDS[4 * number : 4 * number + 4]
        for word in words:
            clip(f"clips/{word}.mp3")
            clip(f"audio/{part}/{word}.wav")
        rows = [f'v{number}\t{word}.mp3\t{word.title()} "said"' for word in words]
        table("client_id\tpath\tsentence", *rows, f"v{number}\tx.mp3\t", name=f"{side}.tsv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = opened(CommonVoice(str(tmp_path), "en"))
    assert data.facts.counts == {"train": 4, "val": 4, "test": 4}
    assert data.facts.left_out == {"without a transcript": 3}
    assert texts(data, "train") == {f"{word} said" for word in WORDS[:4]}
    for number, part in enumerate(("train", "dev", "test")):
        words = WORDS[4 * number : 4 * number + 4]
        rows = [f"{n}\t{word}.wav\t{word.title()}.\t{word}\t_\t8000\tMALE" for n, word in enumerate(words)]
        table(*rows, name=f"{part}.tsv")
    fleurs = opened(FLEURS(str(tmp_path), "en"))
    assert texts(fleurs, "test") == set(WORDS[8:])
