"""Listen to a checkpoint with numbers: does it play what it was asked for?

    python training/evaluate.py --weights DIR --data CORPUS [--rows model,corpus] [--seeds 3] [--out FILE.json]

prints a table of the prompts of captions.evaluation_prompts, in phrasings that training never saw, and of the
corpus's validation split. The rows:
    corpus   the validation clips themselves
    ceiling  the same through the VAE and the vocoder: the UNet can do no better
    model    a take of each prompt and seed
    led      as many takes, led by validation clips' own CLAP audio vectors: what the text tower costs
    random   the model with random weights but for CLAP: the floor
Tempo, percussion, spectrum, key and style are measured by signal processing alone, without the model's own networks.

    python training/evaluate.py --weights DIR --data CORPUS --settings num_inference_steps=999 scheduler=dpm,eta=0 ...

has a row of takes for each of several settings of the section sampling, with the same noise; the last measure is the
RMS distance of their log-mel spectrograms from the first row's.
"""
import argparse
import json
import math
import os
import pathlib
import sys
import time

if __name__ == "__main__":
    os.environ.setdefault("GLOG_v", "4")  # MindSpore reads it when it is imported: no lines of its own
sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent), str(pathlib.Path(__file__).resolve().parent.parent)]

import numpy as np
from scipy import linalg, ndimage, signal

import captions
import data
import musicldm
import weights as checkpoints
from weights import InputError

ROWS = ("corpus", "ceiling", "model", "led", "random")
RATE, SECONDS = 16000, 10.24
WITHIN = 0.05  # of a tempo, for it to be right
# How well each note fits a key of C, from C upwards: the ratings of Krumhansl & Kessler (1982), table 2
PROFILES = {"major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
            "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)}


# ------------------------------------------------------------------------------------------- by signal processing alone

def spectrogram(audio, size=1024, hop=160):
    """Magnitudes (frames, size / 2 + 1) of a waveform (samples,) at 16 kHz, under a Hann window."""
    return np.abs(signal.stft(audio, RATE, nperseg=size, noverlap=size - hop)[2].T)


def tempo(audio):
    """BPM, 50 to 200: the period at which the rise of the log spectrum is most like itself, best near 110."""
    flux = np.maximum(np.diff(np.log(spectrogram(audio) + 1e-4), axis=0), 0).sum(1)
    flux = flux - ndimage.uniform_filter1d(flux, 100)
    correlation = signal.correlate(flux, flux)[len(flux) - 1:]
    tempos = np.arange(50, 200, 0.5)
    lags = 60 * RATE / 160 / tempos
    scores = sum(np.interp(k * lags, np.arange(len(correlation)), correlation) for k in (1, 2, 4))
    return tempos[np.argmax(scores * np.exp(-0.5 * np.log2(tempos / 110) ** 2))]


def same_tempo(a, b):
    """Whether two tempos are the same within 5 %, or one is double or half the other."""
    return any(abs(a / b / octave - 1) <= WITHIN for octave in (0.5, 1, 2))


def percussive_share(audio):
    """The share of energy in what is steep in time rather than in frequency, 0 to 1 (Fitzgerald, 2010)."""
    s = spectrogram(audio, hop=320)
    steady, steep = ndimage.median_filter(s, (17, 1)) ** 2, ndimage.median_filter(s, (1, 17)) ** 2
    return float((s ** 2 * steep / (steady + steep + 1e-12)).sum() / (s ** 2).sum())


def centroid(audio):
    """Hz: the mean frequency, weighted by magnitude."""
    s = spectrogram(audio)
    return float((s.sum(0) @ np.linspace(0, RATE / 2, s.shape[1])) / s.sum())


def flatness(audio):
    """Geometric over arithmetic mean of the power spectrum, by frame: 0.56 for white noise, 0 for tones."""
    power = spectrogram(audio) ** 2 + 1e-10
    return float(np.mean(np.exp(np.log(power).mean(1)) / power.mean(1)))


def chroma(audio):
    """How loud each of the twelve notes is, from C upwards, in all octaves from 60 to 2000 Hz."""
    s = spectrogram(np.pad(audio, (0, max(0, 4096 - len(audio)))), 4096, 1024).sum(0)
    frequencies = np.fft.rfftfreq(4096, 1 / RATE)
    heard = (frequencies > 60) & (frequencies < 2000)
    notes = np.round(12 * np.log2(frequencies[heard] / 440) + 9).astype(int) % 12
    return np.bincount(notes, s[heard], 12) / np.bincount(notes, minlength=12)


def key(audio):
    """(0 to 11 from C upwards, mode) of the key whose profile is most like the chroma, and that correlation."""
    notes = chroma(audio)
    fits = {(tonic, mode): float(np.corrcoef(notes, np.roll(profile, tonic))[0, 1])
            for mode, profile in PROFILES.items() for tonic in range(12)}
    best = max(fits, key=fits.get)
    return best, fits[best]


def transposition(a, b):
    """By how many semitones, 0 to 11, b is to be raised for its chroma to be most like that of a (Serra et al., 2008).

    0 is the same key, or its relative. Clips in one key agree in it more often than in `key`: their chords say more of
    the notes in use than of the key.
    """
    notes, others = chroma(a), chroma(b)
    return int(np.argmax([np.corrcoef(notes, np.roll(others, raised))[0, 1] for raised in range(12)]))


def hum(audio):
    """The share of power above 300 Hz within 1 Hz of multiples of 100 Hz, at which spectrograms have their frames.

    A vocoder that has not learned pitch repeats itself with each of them. White noise has 0.02.
    """
    power = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) ** 2
    frequencies = np.fft.rfftfreq(len(audio), 1 / RATE)
    above, near = frequencies > 300, np.abs((frequencies + 50) % 100 - 50) < 1
    return float(power[above & near].sum() / power[above].sum())


def style_features(audio):
    """Level, spread and movement of 64 log-mel bands (192,)."""
    mel = np.log(spectrogram(audio) @ musicldm.mel_filters(RATE, 1024, 0, RATE / 2, 64) + 1e-4)
    return np.concatenate([mel.mean(0), mel.std(0), np.abs(np.diff(mel, axis=0)).mean(0)])


def style_distances(features, known):
    """{style: distance to the mean of `known` {style: (clips, 192)}, each feature in units of its own spread}."""
    spread = np.concatenate([x - x.mean(0) for x in known.values()]).std(0)
    return {style: float(np.linalg.norm((features - x.mean(0)) / spread)) for style, x in known.items()}


def nearest_style(features, known):
    """The style with the least of `style_distances`."""
    distances = style_distances(features, known)
    return min(distances, key=distances.get)


def roughness(audio, places, width=320):
    """The largest second difference within `width` samples of some places, over the 0.999 quantile of all others."""
    bend, near = np.abs(np.diff(audio, 2)), np.zeros(len(audio) - 2, bool)
    for place in places:
        near[max(0, place - width):place + width] = True
    return float(bend[near].max() / np.quantile(bend[~near], 0.999))


# ------------------------------------------------------------------------------------------------------ by CLAP vectors

def frechet_distance(a, b):
    """Between normal distributions with the moments of rows a and b (n, D) (Heusel et al., 2017, equation 6)."""
    means, covariances = [x.mean(0) for x in (a, b)], [np.cov(x, rowvar=False) for x in (a, b)]
    roots = np.sqrt(np.maximum(linalg.eigvals(covariances[0] @ covariances[1]).real, 0))
    return float(((means[0] - means[1]) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * roots.sum())


def share_near(a, b, cosine):
    """SIM_AA: the share of unit vectors a (n, D) whose nearest of b (m, D) has at least that cosine (Chen et al.)."""
    return float(((a @ b.T).max(1) >= cosine).mean())


# ----------------------------------------------------------------------------------------------------------------- rows

def takes(cfg, params, requests, seeds, conditions=None, say=print):
    """[(request, waveform)] of every request {"prompt", ...} with every seed; conditions are vectors for prompts."""
    made, began = [], time.perf_counter()
    for seed in range(seeds):
        for first in range(0, len(requests), 6):
            batch = requests[first:first + 6]
            given = {} if conditions is None else {"prompt_embeds": conditions[first:first + 6]}
            prompts = [request["prompt"] for request in batch] if conditions is None else None
            audio = musicldm.generate(cfg, prompts, params, seed=seed, audio_length_in_s=SECONDS, **given)
            made += zip(batch, audio)
            if first == 0:
                each = (time.perf_counter() - began) / len(made)
                say(f"{len(made)} of {seeds * len(requests)} takes, {each:.1f} s each")
    return made


def of_each_style(tracks, count):
    """Up to `count` tracks of each style."""
    return [track for style in {track["style"]: None for track in tracks}
            for track in [x for x in tracks if x["style"] == style][:count]]


def round_trip(cfg, audio, params):
    """A clip (samples,) as the VAE and the vocoder give it back: the ceiling of whatever a UNet learns."""
    mel = musicldm.decode_latents(cfg, musicldm.encode_latents(cfg, audio, params, RATE), params)
    return musicldm.vocode(cfg, mel, params)[0, :len(audio)]


def make_row(row, cfg, params, validation, prompts, seeds, say=print):
    """[(request, waveform)] of one of ROWS; a request is a dict with style, tempo (or None) and for prompts prompt."""
    def sound(track):
        return data.crop(track, 0, SECONDS, RATE)

    if row == "corpus":
        return [(track, sound(track)) for track in validation]
    if row == "ceiling":
        return [(track, round_trip(cfg, sound(track), params)) for track in validation]
    if row == "led":
        leaders = of_each_style(validation, len(prompts) // len({prompt["style"] for prompt in prompts}))
        vectors = np.concatenate([musicldm.encode_audio(cfg, sound(track), params, RATE) for track in leaders])
        return takes(cfg, params, leaders, seeds, vectors, say)
    if row == "random":
        params = {**checkpoints.random_params(cfg, 0), "text_encoder": params["text_encoder"]}
    return takes(cfg, params, prompts, seeds, None, say)


def judge(made, real, known, vectors, read):
    """What the table says of a row: {measure: number}, nan where nothing can be measured.

    made: [(request, waveform)]; real: {style: (centroid, flatness) of the corpus}; known: `nearest_style`'s
    vectors: {"own" (n, D), "validation", "training"} of CLAP; read: the requests' text vectors (n, D), or None
    """
    with_tempo = [(request["tempo"], audio) for request, audio in made if request.get("tempo")]
    styles = [request["style"] for request, _ in made]
    percussive = np.array([percussive_share(audio) for _, audio in made])
    drums, strings = (percussive[[s == style for s in styles]] for style in ("drums alone", "string ensemble"))
    shapes = np.log2([[centroid(audio), flatness(audio)] for _, audio in made]) - np.log2([real[s] for s in styles])
    own = vectors["own"]

    def mean(values):
        return float(np.mean(values)) if len(values) else math.nan

    return {
        "takes": len(made), "tempo right": mean([same_tempo(tempo(audio), bpm) for bpm, audio in with_tempo]),
        "style right": mean([nearest_style(style_features(audio), known) == style
                             for style, (_, audio) in zip(styles, made)]),
        "percussive, drums": mean(drums), "percussive, strings": mean(strings),
        "drums / strings": mean(drums) / mean(strings),
        "centroid, octaves off": mean(np.abs(shapes[:, 0])), "flatness, octaves off": mean(np.abs(shapes[:, 1])),
        "key clarity": mean([key(audio)[1] for style, (_, audio) in zip(styles, made) if style != "drums alone"]),
        "hum": mean([hum(audio) for _, audio in made]),
        "Frechet distance": frechet_distance(own, vectors["validation"]),
        "text-audio cosine": mean((own * read).sum(1)) if read is not None else math.nan,
        "SIM_AA@90": share_near(own, vectors["training"], 0.90),
        "SIM_AA@95": share_near(own, vectors["training"], 0.95)}


def rms_distance(cfg, a, b):
    """Between the log-mel spectrograms of two waveforms (samples,)."""
    a, b = (musicldm.log_mel(cfg["vocoder"], audio) for audio in (a, b))
    return float(((a - b) ** 2).mean() ** 0.5)


def evaluate(cfg, params, tracks, prompts, rows=ROWS, seeds=3, settings=None, say=print):
    """{row: {measure: number}}; tracks as data.read_manifest gives them, with styles and both splits.

    settings: {row: cfg} instead of rows: takes of the prompts with each
    """
    training, validation = data.of_split(tracks, "train"), data.of_split(tracks, "validation")
    missing = {prompt["style"] for prompt in prompts} - {track.get("style") for track in training}
    if missing or {track.get("style") for track in validation} - {track.get("style") for track in training}:
        raise InputError(f"--data: no track to learn the style of {', '.join(sorted(missing)) or 'a validation clip'}; "
                         "valid: a corpus of training/corpus.py")

    def heard(waveforms):
        return np.concatenate([musicldm.encode_audio(cfg, audio, params, RATE) for audio in waveforms])

    known, shapes, training_vectors = {}, {}, []
    for track in training:
        audio = data.crop(track, 0, SECONDS, RATE)
        known.setdefault(track["style"], []).append(style_features(audio))
        shapes.setdefault(track["style"], []).append((centroid(audio), flatness(audio)))
        training_vectors.append(heard([audio]))
    known = {style: np.array(x) for style, x in known.items()}
    shapes = {style: np.exp(np.log(x).mean(0)) for style, x in shapes.items()}
    say(f"{len(training)} training clips heard")
    real = make_row("corpus", cfg, params, validation, prompts, seeds)
    vectors = {"validation": heard([audio for _, audio in real]), "training": np.concatenate(training_vectors)}
    result, first = {}, None
    for row in settings or rows:
        made = (takes(settings[row], params, prompts, seeds, None, say) if settings else
                make_row(row, cfg, params, validation, prompts, seeds, say))
        texts = [request.get("prompt") for request, _ in made]
        read = musicldm.encode_prompt(cfg, texts, params) if all(texts) else None
        result[row] = judge(made, shapes, known, {**vectors, "own": heard([audio for _, audio in made])}, read)
        if settings:
            first = first or made
            result[row]["distance to the first"] = float(np.mean([rms_distance(cfg, a, b) for (_, a), (_, b) in
                                                                  zip(made, first)]))
        say(f"{row}: {json.dumps(result[row])}")
    return result


def music_in(cfg, params, tracks, prompts, say=print):
    """{row: {measure: number}} of what is made from eight validation clips, each of another style.

    A variation is asked for the next clip's style, what is new in a clip for its own style and tempo, or by the clip
    itself. Repainted is the middle, three fifths of a clip; added is twice a clip. The new part's tempo is compared
    with that of the clip's notes, its key with the clip's, by `transposition` and by `key`. Beside them are others
    alike, up to eight clips of the corpus in the clip's style, tempo and key: a perfect extension would be like these.
    Then the middle of clips that the VAE and the vocoder give back, and takes of the same prompt without the clip.
    """
    originals = [track for track in of_each_style(data.of_split(tracks, "validation"), 1) if track["key"]][:8]
    asked = {prompt["style"]: prompt["prompt"] for prompt in prompts}
    known = {style: np.array([style_features(data.crop(track, 0, SECONDS, RATE)) for track in of_each_style(
        [x for x in data.of_split(tracks, "train") if x["style"] == style], 40)]) for style in asked}
    begin, end = 0.2 * SECONDS, 0.8 * SECONDS
    middle = slice(round(begin * RATE), round(end * RATE))
    rows = {"others alike": {}, "round trip": {}, "without the clip": {},
            **{f"strength {strength}": {"strength": strength} for strength in (0.2, 0.5, 0.8)},
            "repainted": {"repaint": [[begin, end]]}, "extended": {"extend": 2 * SECONDS},
            "extended, led by the clip": {"extend": 2 * SECONDS},
            "extended, strength 1": {"extend": 2 * SECONDS, "strength": 1.0}}
    result = {}
    for row, options in rows.items():
        found = []
        for i, track in enumerate(originals):
            clip = data.crop(track, 0, SECONDS, RATE).astype(np.float32)
            other = row.startswith("strength")
            style = originals[(i + 1) % len(originals)]["style"] if other else track["style"]
            prompt = asked[style] if other else f"{style} at {track['tempo']:g} bpm"
            if row == "others alike":
                alike = [x for x in tracks if x is not track and all(x[name] == track[name] for name in
                                                                     ("style", "tempo", "key", "mode"))]
                made = [data.crop(x, 0, SECONDS, RATE) for x in alike[:8]]
            elif row == "round trip":
                made = [round_trip(cfg, clip, params)]
            elif row == "without the clip":
                made = musicldm.generate(cfg, prompt, params, seed=i, audio_length_in_s=SECONDS)
            elif row == "extended, led by the clip":
                made = musicldm.generate(cfg, None, params, audio_prompt=clip, init_audio=clip, seed=i, **options)
            else:
                made = musicldm.generate(cfg, prompt, params, init_audio=clip, seed=i, **options)
            places = [middle.start, middle.stop] if row == "repainted" else [len(clip)] if "extend" in options else []
            for audio in made:
                new = audio[middle] if row in ("round trip", "repainted") else audio[-len(clip):]
                found.append({
                    "distance to the clip": rms_distance(cfg, audio[:len(clip)], clip),
                    "distance to the style": style_distances(style_features(audio[-len(clip):]), known)[style],
                    "tempo kept": same_tempo(tempo(new), track["tempo"]),
                    "key kept, by notes": transposition(new, clip) == 0, "by profile": key(new)[0] == key(clip)[0],
                    "roughness of joins": roughness(audio, places) if places else math.nan})
        if found:
            result[row] = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
            say(f"{row}: {json.dumps(result[row])}")
    return result


def table(result):
    """The result in Markdown: a line a measure, a column a row."""
    lines = [["", *result], ["---"] * (len(result) + 1)]
    for measure in next(iter(result.values())):
        lines.append([measure, *(f"{found[measure]:.3g}" if not math.isnan(found[measure]) else ""
                                 for found in result.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None):
    """The command line: 0 when the table is printed, 2 after one line about a mistake."""
    def fail(message):
        raise InputError(message)

    parser = argparse.ArgumentParser(description="Listen to a checkpoint with numbers.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--weights", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="DIR", help="a corpus of training/corpus.py")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="A,B", help="some of %(default)s")
    parser.add_argument("--settings", nargs="+", metavar="A=1,B=2", help="instead of rows: of config.yaml's sampling")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="takes of each prompt, 3")
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="of each style, 4 and all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of config.yaml, such as "
                        "sampling.num_inference_steps=50")
    parser.add_argument("--music-in", action="store_true", help="instead: of variation, repainting and continuation")
    parser.add_argument("--out", metavar="FILE", help="the numbers as JSON")
    try:
        args = parser.parse_args(argv)
        rows = args.rows.split(",")
        if not {*rows} <= {*ROWS} or min(args.seeds, args.prompts) < 1:
            raise InputError(f"--rows {args.rows}, --seeds {args.seeds}, --prompts {args.prompts}; valid: some of "
                             f"{','.join(ROWS)}, 1 or more, 1 or more")
        if args.out:
            musicldm.check_output("--out", [pathlib.Path(args.out)], (".json",), 1)
        tracks = data.read_manifest(args.data)
        if not all({"style", "tempo", "key"} <= track.keys() for track in tracks):
            raise InputError("--data: a track states no style, tempo or key; valid: a corpus of training/corpus.py")
        cfg, *several = (musicldm.load_config(weights=args.weights, overrides=args.set + [
            f"sampling.{text}" for text in setting.split(",") if text]) for setting in ["", *(args.settings or ())])
        params = checkpoints.load_params(cfg)

        def say(text):
            print(text, file=sys.stderr, flush=True)

        prompts = of_each_style(captions.evaluation_prompts(), args.prompts)
        settings = dict(zip(args.settings or (), several))
        result = (music_in(cfg, params, tracks, prompts, say) if args.music_in else
                  evaluate(cfg, params, tracks, prompts, rows, args.seeds, settings, say))
        print(table(result), flush=True)
        if args.out:
            musicldm.write_files({pathlib.Path(args.out): json.dumps(result, indent=1).encode()})
    except InputError as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
