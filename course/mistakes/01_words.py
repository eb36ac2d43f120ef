"""Wrong and other right answers to exercise 1."""

B = "clip.Tokenizer._bpe"
MIN = 'min(zip(parts, parts[1:]), key=lambda p: self.ranks.get(p, float("inf")))'
START = 'parts = [*word[:-1], word[-1] + "</w>"]'
ONCE = """
def _bpe(self, word):
    parts = [*word[:-1], word[-1] + "</w>"]
    for pair in sorted(self.ranks, key=self.ranks.get):
        i = 0
        while i < len(parts) - 1:
            if tuple(parts[i : i + 2]) == pair:
                parts[i : i + 2] = ["".join(pair)]
            i += 1
    return parts
"""
MISTAKES = [
    {"name": "leftmost first", "caught": "best_first", "code": {B: [(MIN, "next((p for p in zip(parts, parts[1:]) if p in self.ranks), (parts[0], parts[1]))")]},
     "says": "You merge the leftmost pair that CAN be merged. In 'abc' both (a, b) and (b, c) may be possible: which of the two did training count more often?"},
    {"name": "worst first", "caught": "best_first", "code": {B: [(MIN, "max(zip(parts, parts[1:]), key=lambda p: self.ranks.get(p, -1))")]},
     "says": "You merge the pair of the HIGHEST rank first. Ranks count in the order in which pairs were learned: which pair was the most frequent of all?"},
    {"name": "one merge only", "caught": "again", "code": {B: [("while len(parts) > 1:", "for _ in range(1):")]},
     "says": "You stop after one round. What can a piece that has just been merged do next?"},
    {"name": "no end of word", "caught": "characters", "code": {B: [(START, "parts = [*word]")]},
     "says": "Nothing marks the end of the word. How would one tell the word 'cat' from the beginning of 'catch'?"},
    {"name": "the end on its own", "caught": "characters", "code": {B: [(START, 'parts = [*word, "</w>"]')]},
     "says": "The mark of the end is a piece by itself in yours. Which piece is to carry it?"},
    {"name": "every character an end", "caught": "characters", "code": {B: [(START, 'parts = [c + "</w>" for c in word]')]},
     "says": "Every character carries the mark of the end. Where does a word end?"},
    {"name": "a mark at the beginning", "caught": "characters", "code": {B: [(START, 'parts = ["</w>" + word[0], *word[1:]]')]},
     "says": "You mark the first character. The mark says where a word ENDS."},
    {"name": "overlapping", "caught": "everywhere", "code": {B: [("                i += 2\n", "                i += 1\n")]},
     "says": "After a merge you go on one place too early, so that a piece is used twice. What has 'aaa' become of?"},
    {"name": "one occurrence a round", "caught": "everywhere", "code": {B: [("if tuple(parts[i : i + 2]) == pair:", "if tuple(parts[i : i + 2]) == pair and len(merged) == i:")]},
     "says": "You merge a pair where it stands first, and look for the lowest rank at once. When is a round over?"},
    {"name": "longest piece first", "caught": "best_first", "code": {B: [(MIN, "max(zip(parts, parts[1:]), key=lambda p: (p in self.ranks, len(p[0] + p[1])))")]},
     "says": "You prefer the longest piece, as another method (WordPiece) does. What does BPE know of its pairs besides their letters?"},
    {"name": "from the right", "caught": "everywhere", "code": {B: '''
def _bpe(self, word):
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        pair = min(zip(parts, parts[1:]), key=lambda p: self.ranks.get(p, float("inf")))
        if pair not in self.ranks:
            break
        i = len(parts) - 1
        while i > 0:
            if (parts[i - 1], parts[i]) == pair:
                parts[i - 1 : i + 1] = [parts[i - 1] + parts[i]]
                i -= 1
            i -= 1
    return parts
'''}, "says": "You merge from right to left. Of three equal letters, which two belong together if one reads from the left?"},
    {"name": "one place a round, then the next pair", "caught": "everywhere", "code": {B: ONCE.replace("(pair)]", "(pair)]; break")},
     "says": "You merge each pair in one place only. What if it stands in the word twice?"},
    {"name": "once through the ranks", "caught": "again", "code": {B: ONCE}, "says": "You go through the list once. A merge can make a pair whose turn is over in yours: when is the lowest rank to be looked for?"},
    {"name": "rank 0 is falsy", "caught": "best_first", "code": {B: [(MIN, MIN.replace('.get(p, float("inf"))', '.get(p) or float("inf")'))]},
     "says": "The pair of rank 0, the best of all, counts as missing in yours. What does `or` take 0 for?"},
]  # fmt: skip
RIGHT = [
    {"name": "through the ranks, from the first one after each merge", "code": {B: '''
def _bpe(self, word):
    parts, pairs = [*word[:-1], word[-1] + "</w>"], sorted(self.ranks, key=self.ranks.get)
    while pair := next((pair for pair in pairs if pair in zip(parts, parts[1:])), None):
        i = 0
        while i < len(parts) - 1:
            if tuple(parts[i : i + 2]) == pair:
                parts[i : i + 2] = ["".join(pair)]
            i += 1
    return parts
'''}},
    {"name": "list of pairs", "code": {B: '''
def _bpe(self, word):
    parts = list(word)
    parts[-1] += "</w>"
    while True:
        ranked = [(self.ranks[p], p) for p in zip(parts, parts[1:]) if p in self.ranks]
        if not ranked:
            return parts
        left, right = min(ranked)[1]
        out = []
        while parts:
            if len(parts) > 1 and parts[0] == left and parts[1] == right:
                out.append(left + right)
                parts = parts[2:]
            else:
                out.append(parts[0])
                parts = parts[1:]
        parts = out
'''}},
    {"name": "a tuple", "code": {B: [("return parts", "return tuple(parts)")]}},
]  # fmt: skip
