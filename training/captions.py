"""Captions of what training/corpus.py composes, and prompts for evaluation in words that no caption uses."""
import re

# style: names, instruments and qualities, as people write them
WORDS = {
    "techno": (("techno", "melodic techno", "techno music", "club techno", "a techno track"),
               ("synths", "a synth lead", "synth bass", "a drum machine", "electronic drums", "a four-four kick"),
               ("electronic", "hypnotic", "pulsing", "driving")),
    "house": (("house", "disco", "house music", "disco house", "a disco track"),
              ("piano chords", "a funky bass", "strings", "a dance beat", "open hi-hats"),
              ("danceable", "groovy", "funky", "feel-good")),
    "rock": (("rock", "rock music", "hard rock", "a rock song", "guitar rock"),
             ("distorted guitars", "electric guitars", "loud drums", "electric bass", "a lead guitar", "a guitar solo"),
             ("heavy", "powerful", "loud", "raw")),
    "hip-hop": (("hip-hop", "hip hop", "a hip-hop beat", "hip hop instrumental", "lo-fi hip hop"),
                ("a deep bass", "electric piano", "vibraphone", "808 drums", "a lazy drum beat", "rhodes chords"),
                ("laid-back", "chilled", "relaxed", "head-nodding")),
    "jazz trio": (("jazz", "swing jazz", "a jazz trio", "jazz music", "swing"),
                  ("piano, double bass and drums", "a walking bass", "a piano solo", "a ride cymbal", "upright bass",
                   "piano and drums"), ("smooth", "lively", "cool", "relaxed")),
    "solo piano": (("piano", "solo piano", "piano music", "a piano piece", "a piano ballad"),
                   ("a gentle melody", "rolling chords", "a soft touch", "broken chords", "a singing melody"),
                   ("gentle", "romantic", "tender", "intimate")),
    "string ensemble": (("strings", "string ensemble", "string orchestra", "classical strings", "orchestral strings"),
                        ("violins", "cellos", "violas", "a violin melody", "an orchestra"),
                        ("classical", "elegant", "cinematic", "expressive")),
    "church organ": (("organ", "church organ", "organ music", "an organ chorale", "a hymn"),
                     ("deep pedals", "full chords", "a choir of pipes", "a hymn tune", "a solemn melody"),
                     ("solemn", "sacred", "majestic", "grand")),
    "acoustic guitar": (("acoustic guitar", "guitar", "folk guitar", "guitar picking", "solo acoustic guitar"),
                        ("steel strings", "finger picking", "gentle picking", "a finger-picked melody"),
                        ("folk", "warm", "soft", "cosy")),
    "ambient pads": (("ambient", "ambient music", "ambient pads", "an ambient soundscape", "atmospheric pads"),
                     ("soft synth pads", "warm pads", "gentle bells", "pads and bells", "no drums"),
                     ("atmospheric", "dreamy", "spacious", "ethereal")),
    "synth arpeggios": (("synth arpeggios", "arpeggios", "an arpeggiated synth", "synthwave arpeggios", "synth music"),
                        ("fast synth notes", "an arpeggiator", "synth bass", "a square synth", "running synths"),
                        ("retro", "sparkling", "bubbling", "electronic")),
    "drums alone": (("drums", "a drum beat", "drums alone", "drum solo", "solo drums"),
                    ("kick and snare", "only drums", "a drum kit", "hi-hats", "drum fills"),
                    ("rhythmic", "percussive", "punchy", "steady"))}
MOODS = {("minor", False): ("sad", "melancholic", "dark", "moody", "sorrowful"),
         ("minor", True): ("dark", "tense", "dramatic", "moody", "melancholic"),
         ("major", False): ("happy", "bright", "peaceful", "calm", "hopeful"),
         ("major", True): ("happy", "bright", "cheerful", "joyful", "uplifting")}
SPEEDS = (("slow", "slow-paced", "leisurely"), ("mid-tempo", "medium tempo", "moderate"),
          ("fast", "up-tempo", "quick"))  # up to 80 BPM, up to 105, above
NUMBERS = ("{} bpm", "{} BPM", "at {} bpm", "at {} beats per minute", "{} beats per minute", "with {} bpm")
# A clip has a caption of each row.
TEMPLATES = (("{name}", "{bare}", "{mood} {bare}"),
             ("{bare}, {number}", "{tempo} bpm {bare}", "{mood} {bare} {number}"),
             ("{speed} {bare} {number}", "{speed} {mood} {bare}, {number}",
              "{tempo} BPM {mood} {bare} with {instrument}"),
             ("{speed} {mood} {bare} with {instrument}, {number}, {key}",
              "{quality} {bare} {key} with {instrument} {number}"),
             ("{mood} {bare}", "{speed} {mood} {bare}", "{speed} {bare}", "{quality} {bare}"),
             ("{bare} with {instrument}", "{bare} with {instrument} and {another}", "{mood} {bare} with {instrument}"),
             ("{mood} {bare} with a {speed} beat and {instrument}",
              "{speed}, {quality} {bare} with {instrument}, {key}",
              "{quality}, {mood} {bare} with {instrument} and {another}", "{speed} {bare} {key}"),
             ("{tags}",))
OPENINGS = ("a piece of ", "a recording of ", "an instrumental: ", "a loop of ", "a clip of ", "music: ", "make ",
            "create ")
KEYLESS = ("no melody", "without other instruments")
ENDINGS = (", instrumental", ", high quality", ", no vocals", ", well played", " in the background", ", a short loop")


def captions(clip, rng):
    """Eight different captions of a clip of `corpus.compose`, from a word to a sentence; three name the tempo's number,
    and the last, tags in any order, now and then.

    rng: NumPy's generator
    """
    def pick(options):
        return str(options[rng.integers(len(options))])

    names, instruments, qualities = WORDS[clip["style"]]
    mode, tempo, result = clip["mode"], clip["tempo"], []
    while len(result) < len(TEMPLATES):
        name, (instrument, another) = pick(names), rng.permutation(instruments)[:2]
        words = {"name": name, "bare": name.removeprefix("a ").removeprefix("an "), "quality": pick(qualities),
                 "mood": pick(MOODS[mode, tempo > 105] if mode else qualities), "number": pick(NUMBERS).format(tempo),
                 "key": pick((f"in a {mode} key", f"in {clip['key']} {mode}", f"in {mode}") if mode else KEYLESS),
                 "speed": pick(SPEEDS[(tempo > 80) + (tempo > 105)])}
        tags = [words["bare"], *rng.permutation([instrument, *map(words.get, ("mood", "speed", "number"))])]
        text = pick(TEMPLATES[len(result)]).format(tempo=tempo, instrument=instrument, another=another, **words,
                                                   tags=", ".join(rng.permutation(tags[:rng.integers(3, 6)])))
        text = text.replace(" a up", " an up")
        if len(result) > 1 and rng.random() < 0.3:
            text = pick(OPENINGS) + text if rng.random() < 0.5 else text + pick(ENDINGS)
        text = text[0].upper() + text[1:] if rng.random() < 0.15 else text
        long_words = re.findall(r"\w{5,}", text.lower())
        if text not in result and len(long_words) == len(set(long_words)):  # no "piano music with a single piano"
            result.append(text)
    return result


# What training captions never hold, for evaluation: other words, other ways to put them.
HELD_OUT = ("i want", "i'd like", "please", "some ", "something", "play me", "for a ", "for the ", "like in", "around",
            "roughly", "tempo:", "tempo of", "bpm:", "beats a minute", "that sounds", "could be", "full of", "we need",
            "rave", "warehouse", "nightclub", "dancefloor", "stadium", "garage", "rapper", "boom bap", "smoky",
            "late night", "pianist", "rainy", "symphon", "chamber", "cathedral", "wedding", "campfire", "unplugged",
            "meditation", "floating", "sequenced", "arcade", "drummer", "marching", "speedy", "sunny", "mournful",
            "unhurried")
EVALUATION = {
    "techno": ("i want 120 bpm techno for a warehouse", "rave music, techno with synths, tempo: 130",
               "something dark and techno with a drum machine", "play me melodic techno full of synths"),
    "house": ("sunny disco for the dancefloor, around 110 bpm", "bpm: 120, house music with piano please",
              "we need bright disco for a nightclub", "something groovy, house with a funky bass"),
    "rock": ("i'd like guitar rock, roughly 100 bpm", "stadium rock at 120 beats a minute",
             "a garage band, loud rock with distorted guitars", "play me something heavy with electric guitars, rock"),
    "hip-hop": ("boom bap hip hop around 80 bpm", "a beat for a rapper, hip-hop, tempo: 90",
                "late night lo-fi hip hop please", "something laid-back with a deep bass, hip-hop"),
    "jazz trio": ("some swing jazz, roughly 120 bpm", "jazz for a smoky bar, 140 beats a minute",
                  "play me a jazz trio with walking bass", "late night jazz, piano and double bass please"),
    "solo piano": ("a pianist alone, piano at around 60 bpm", "tempo: 80, some tender piano",
                   "mournful, sad piano for a rainy day", "something happy and gentle on the piano please"),
    "string ensemble": ("chamber strings, roughly 60 bpm", "i want violins and cellos, strings, 80 beats a minute",
                        "cinematic strings, something symphonic", "play me unhurried, melancholic classical strings"),
    "church organ": ("bpm: 60, organ in a cathedral", "i'd like a church organ around 80 bpm",
                     "organ music for a wedding", "something dark and solemn for the organ please"),
    "acoustic guitar": ("campfire guitar, roughly 80 bpm", "unplugged, acoustic guitar at 100 beats a minute",
                        "some happy folk guitar for a sunny day", "play me an acoustic guitar with steel strings"),
    "ambient pads": ("floating ambient pads, around 60 bpm", "meditation, ambient music, tempo: 70",
                     "something ambient, calm and dreamy for the night", "i want warm pads, ambient, full of bells"),
    "synth arpeggios": ("sequenced synth arpeggios, bpm: 110", "arcade game, arpeggios on a synth, around 130 bpm",
                        "something full of synth arpeggios", "i'd like a bright and speedy arpeggiated synth"),
    "drums alone": ("a drummer alone, drums, 80 beats a minute", "i want a drum beat of roughly 100 bpm",
                    "play me a drum solo", "marching drums, only drums please")}


def evaluation_prompts():
    """Prompts in phrasings that no training caption has: dicts of prompt, style and tempo (BPM, or None if not named).

    Four a style, two of them with a tempo. Each has a word or phrase of HELD_OUT beside words that captions do have.
    """
    return [{"prompt": text, "style": style, "tempo": int(number[0]) if (number := re.search(r"\d+", text)) else None}
            for style, texts in EVALUATION.items() for text in texts]
