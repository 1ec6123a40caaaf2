"""Problems with other numbers of the GSM8K example: every answer follows from its question."""

import random
import re

import pytest
from pipelines import load_example


CLIPS = (
    "Natalia sold 48 clips in April, and then she sold 3/4 as many in May, at $1,200 in 2 shops. How much is that?",
    "In May she sold 48*3/4=<<48*3/4=36>>36 clips.\nThat is 48+36 = <<48+36=84>>84.\nAll cost 84 * $1,200 = "
    "$<<84*1200=100800>>100,800.\n#### 100,800",
)
PLAIN = [
    ("A box holds 12 eggs. How many do 5 boxes hold?", "They hold 12*5=<<12*5=60>>60 eggs.\n#### 60"),
    (
        "Tom has 20 apples, eats 8 and shares the rest with 3 friends. How many does each of the 4 get?",
        "There are 20-8=<<20-8=12>>12 left.\nEach gets 12/4=<<12/4=3>>3.\n#### 3",
    ),
    (
        "A pen costs $1.50. What do 30 pens and a book of $1,000 cost?",
        "Pens: 30*1.5=$<<30*1.5=45>>45.\nAll: 1000 + 45 = $<<1000+45=1045>>1,045.\n#### 1,045",
    ),
]


@pytest.fixture(scope="module")
def module():
    return load_example("new_numbers")


def skeleton(text):
    return re.sub(r"\d[\d,]*(\.\d+)?", "N", text)


def test_made_problems_are_right(module):
    made = module.make_problems(PLAIN, 300, seed=1)
    assert len(made) == 300 and len(set(made)) > 100
    skeletons = {(skeleton(question), skeleton(answer)) for question, answer in PLAIN}
    for question, answer in made:
        assert (skeleton(question), skeleton(answer)) in skeletons
        known = set(re.findall(r"[\d.]+", question.replace(",", "")))
        results = []
        for expression, result in re.findall(r"<<([^=]*)=([^>]*)>>", answer):
            for operand in re.findall(r"[\d.]+", expression):
                assert operand in known or operand == "1.5"  # "$1.50"
            assert eval(expression) == pytest.approx(float(result)) and float(result) > 0
            known.add(result)
            results.append(result)
        # What is behind an annotation, and at the end, is its result.
        assert [text.replace(",", "") for text in re.findall(r">>([\d,.]*\d)", answer)] == results
        assert answer.rpartition("#### ")[2].replace(",", "") == results[-1]


def test_numbers_change_and_keep_their_kind(module):
    made = module.make_problems(PLAIN, 300, seed=1)
    eggs = {int(number) for question, _ in made for number in re.findall(r"(\d+) eggs", question)}
    assert len(eggs) > 5 and all(6 <= number <= 25 for number in eggs)
    books = {number for question, _ in made for number in re.findall(r"book of \$([\d,]+)", question)}
    assert len(books) > 1 and all(re.fullmatch(r"\d,000", number) for number in books)
    # 1.5 is no whole number, and so stays.
    assert all("$1.50" in question for question, _ in made if "pen costs" in question)


def test_numbers_that_mean_more_stay(module):
    question, answer = CLIPS
    for seed in range(30):
        made = module.renumber(question, answer, random.Random(seed))
        if made is None:  # the result is too large
            continue
        assert "3/4" in made[0] and "in 2 shops" in made[0]  # a fraction, and what no equation uses
        assert "*3/4=" in made[1]
    dozens = ("Ann buys 12 cakes and a dozen pies, 7 each a week. How many?", "It is 12+7=<<12+7=19>>19.\n#### 19")
    assert module.renumber(*dozens, random.Random(0)) is None


@pytest.mark.parametrize(
    "answer",
    [
        "They hold 60 eggs.\n#### 60",
        "They hold <<12*5=61>>61 eggs.\n#### 61",
        "They hold <<12*5=60>>60 eggs.\n#### 61",
        "They hold <<x=60>>60 eggs.\n#### 60",
        "They hold <<12**5=248832>>248832 eggs.\n#### 248832",
        "They hold <<12*5=60>>60 eggs.",
        "They hold <<12*5=60>>60 and <<60 eggs.\n#### 60",
        "They hold <<__import__('os').getpid()*0+12*5=60>>60 eggs.\n#### 60",
        "They hold <<12*5/0=60>>60 eggs.\n#### 60",
    ],
)
def test_answers_that_do_not_add_up_are_left_out(module, answer):
    question = PLAIN[0][0]
    assert module.renumber(question, answer, random.Random(0)) is None
    with pytest.raises(ValueError, match="`new_numbers` takes problems with numbers in the question"):
        module.make_problems([(question, answer)], 1, seed=0)


def test_a_constant_that_equals_a_result_spoils_nothing(module):
    """Where 60 is the minutes of an hour and a result, a change of the result would change the hour."""
    row = (
        "He reads 8 hours, rests 20 of these minutes, and sings for 400. How long does he sleep?",
        "There are 8*60=<<8*60=480>>480.\nHe sleeps 480-20-400=<<480-20-400=60>>60.\n#### 60",
    )
    for seed in range(50):
        made = module.renumber(*row, random.Random(seed))
        assert made is None or "*60=" in made[1]


def test_the_same_seed_makes_the_same(module):
    made = module.make_problems(PLAIN, 40, seed=5)
    assert made == module.make_problems(PLAIN, 40, seed=5) != module.make_problems(PLAIN, 40, seed=6)
    assert made[:11] == module.make_problems(PLAIN, 11, seed=5)
