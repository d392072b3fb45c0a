"""What is printed of answers that were cut off."""

import io

import pytest

from stagdist.decode.frontend.answers import Answers
from stagdist.decode.frontend.prompts import Prompt
from stagdist.decode.request import FinishReason, Request, RequestOutput


@pytest.mark.parametrize(("as_json", "printed"), [(True, ""), (False, "abc def\n")])
def test_an_answer_cut_off_by_an_error_is_shown_as_text_and_is_no_line_of_json(as_json: bool, printed: str) -> None:
    out = io.StringIO()
    answers = Answers(out, io.StringIO(), str, lambda: None, as_json=as_json)
    answers.accept(Prompt(0, "one", 0, text="abc"), Request("one", (1, 2, 3)))
    answers.take([RequestOutput("one", token_ids=(4,), text=" def")])
    answers.take([RequestOutput("one", finish_reason=FinishReason.ERROR, error="a rank has ended")])
    assert answers.end() == 1  # nothing came that says why
    assert out.getvalue() == printed
