"""The text on which input scales are calibrated when the user names none: short, and of many kinds.

What matters is not what it says but how far it drives the activations: prose, dialogue, code, numbers, markup and
several languages, each from its first token, where decoders have their largest activations.
"""

from __future__ import annotations

from typing import Final

#: one window of tokens each
PASSAGES: Final = (
    """The ferry left the harbour at ten past six, eleven minutes late, with forty cars below and a brass band on the
upper deck. Nobody had invited the band. They had been to a wedding on the mainland, missed the early boat, and now
played to keep warm, while the gulls kept pace with the rail and the lighthouse turned its long white arm over the
water. "We could stop," said the trumpeter, "but then you would hear the engine." An old woman with a basket of plums
laughed and held it out to him. He took two, put one in his pocket for later, and began the next tune a little too
high, so that the clarinet had to climb after him like a cat following a bird up a drainpipe.""",
    """Photosynthesis stores the energy of light in chemical bonds. In the thylakoid membrane two photosystems, joined
by a chain of carriers, lift electrons from water to NADP+; the protons left behind drive ATP synthase. In the stroma
the enzyme rubisco then fixes carbon dioxide to a five-carbon sugar. Rubisco is slow, three to ten reactions per
second, and now and then it takes oxygen by mistake, so a leaf needs a great deal of it: it may well be the most
abundant protein on Earth. Maize and sugar cane concentrate CO2 around the enzyme first, which costs energy but pays
off in hot, bright places. Cacti open their pores at night only, and keep the carbon as malic acid until morning.""",
    '''from collections import Counter
from pathlib import Path


def most_common_words(path: Path, count: int = 10) -> list[tuple[str, int]]:
    """The words that occur most often in a file, with how often they do."""
    words = Counter()
    with path.open(encoding="utf-8") as file:
        for line in file:
            words.update(w.strip(".,;:!?()\\"'").lower() for w in line.split())
    del words[""]
    return words.most_common(count)


if __name__ == "__main__":
    for word, times in most_common_words(Path("notes.txt")):
        print(f"{word:<20} {times:>6}  {'#' * (times // 5)}")
''',
    """Quarterly report, unit 7B. Revenue: 1,284,530.75 EUR (+12.4% on last year, -0.8% on the quarter). Costs:
973,118.20 EUR. Orders: 3,907, of which 211 (5.4%) came back. Mean time to delivery: 2.6 days; 95th percentile: 6.1.
2019 | 2020 | 2021 | 2022 | 2023 | 2024
 412 |  398 |  455 |  601 |  587 |  640
Let x = 3/7 and y = 0.125. Then x + y = 31/56, about 0.5536, and x * y = 3/56. The roots of 2t^2 - 5t - 12 = 0 are
t = 4 and t = -3/2, since (2t + 3)(t - 4) = 2t^2 - 5t - 12. 17 * 23 = 391; 391 / 23 = 17; sqrt(391) is 19.77.""",
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Tide table</title></head>
<body><h1>Tides &amp; times</h1>
<ul><li class="high">04:12 &ndash; 5.3 m</li><li class="low">10:31 &ndash; 0.9 m</li></ul>
<script>document.querySelectorAll("li").forEach((e, i) => { e.dataset.index = i; });</script></body></html>

{"station": "north pier", "readings": [{"t": "2024-03-09T04:12:00Z", "m": 5.3}, {"t": null, "m": -1e-3}], "ok": true}

SELECT s.name, AVG(r.metres) AS mean FROM readings AS r JOIN stations AS s ON s.id = r.station_id
WHERE r.taken_at >= '2024-01-01' GROUP BY s.name HAVING COUNT(*) > 100 ORDER BY mean DESC LIMIT 5;""",
    """Le train de nuit s'arrête à Dijon, où l'on change de locomotive ; les voyageurs dorment déjà. Der Regen hatte die
ganze Nacht auf das Blechdach getrommelt, und erst gegen Morgen wurde es still. El mercado abre a las siete: naranjas,
pescado, pan caliente y noticias del pueblo. Il vento portava dal mare un odore di sale e di legna bruciata. O rio
desce devagar até à foz. Поезд опоздал на два часа, но никто не жаловался. 山の上の小さな駅で、私たちは朝まで待った。
春天来了，河边的柳树发了芽，孩子们在放风筝。
바다는 조용했고, 배는 천천히 항구로 들어왔다. كان البحر هادئا في تلك الليلة.""",
    """1. Wash the lentils and leave them in cold water for an hour.
2. Fry two onions, slowly, until they are brown; add three cloves of garlic, a teaspoon of cumin and half a teaspoon
   of smoked paprika.
3. Add the lentils, a litre of stock and a bay leaf. Simmer for 35 minutes. Do NOT salt before the end.

Notes
- Too thick? Add water. Too thin? Take off the lid.
- Keeps for three days; better on the second.

This agreement is made between the Supplier and the Customer. The Supplier shall not be liable for any indirect loss,
save where such loss arises from its wilful default. Either party may terminate on thirty (30) days' written notice.""",
)
#: (question, answer), one window each, through the model's chat template if it has one
DIALOGUES: Final = (
    (
        "Why is the sky blue during the day and red at sunset?",
        "Air molecules scatter short wavelengths far more strongly than long ones, so by day blue light reaches you "
        "from every direction. At sunset the light has crossed much more air: most of the blue has been scattered "
        "out of the beam, and what is left is orange and red.",
    ),
    (
        "Write a Python function that reverses the words of a sentence.",
        "Here is one way:\n\n```python\ndef reverse_words(sentence: str) -> str:\n"
        '    return " ".join(reversed(sentence.split()))\n```\n\n'
        "`split()` without arguments also removes extra spaces. For example, `reverse_words('one two three')` gives "
        "`'three two one'`.",
    ),
    (
        "Hi! My name is Ana and I have a job interview tomorrow. Any advice?",
        "Hello Ana, and good luck! Three things help most:\n\n1. **Prepare two stories** about problems that you "
        "solved.\n2. **Read what the company does**, and have a question ready.\n3. **Sleep.** It matters more than "
        "another hour of reading.\n\nWhat kind of job is it?",
    ),
    (
        "A train leaves at 14:35 and arrives at 17:10. How long does it take?",
        "From 14:35 to 17:35 would be three hours; it arrives 25 minutes before that. So it takes 2 hours and 35 "
        "minutes, or 155 minutes.",
    ),
)
