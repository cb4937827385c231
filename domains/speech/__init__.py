"""Speech: recognition with a decoder or with CTC, and classes of utterances."""

from __future__ import annotations

from common.domain import Domain

_DATA = "domains.speech.data"
_VOICES = "domains.speech.data.voices"
_TASKS = "domains.speech.tasks"

DOMAIN = Domain(
    name="speech",
    summary="speech: texts and classes of clips with Whisper, wav2vec 2.0, HuBERT and WavLM",
    tasks={
        "Seq2SeqRecognition": _TASKS,
        "CTCRecognition": _TASKS,
        "UtteranceClassification": "domains.speech.utterance",
        "VoiceAdaptation": "domains.speech.synthesis",
        "SpectrogramVoice": "domains.speech.spectrogram",
    },
    data=dict.fromkeys(
        (
            "StampSpeech",
            "AsteriskWords",
            "LibriVoxClips",
            "Manifest",
            "AudioFolder",
            "LabelledAudio",
            "LibriSpeech",
            "CommonVoice",
            "FLEURS",
        ),
        _DATA,
    )
    | dict.fromkeys(("AsteriskVoice", "StampVoice", "VoiceManifest"), _VOICES),
    predict="domains.speech.predict:predict",
    baselines={
        "ZeroShot": "domains.speech.baselines:zero_shot",
        "MajorityClass": "domains.speech.baselines:majority_class",
        "MelStatistics": "domains.speech.baselines:mel_statistics_probe",
        "BaseVoice": "domains.speech.synthesis:base_voice",
        "Recordings": "domains.speech.synthesis:recordings",
    },
    specimens={
        "HF Whisper": "domains.speech.specimens:whisper",
        "HF wav2vec2": "domains.speech.specimens:wav2vec2",
        "HF SpeechT5": "domains.speech.specimens:speecht5",
        "HF VITS": "domains.speech.specimens:vits",
    },
)
