"""What routes have in common."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from unclip.serving.drawing.orders import Order
from unclip.serving.drawing.service import Caller, Service
from unclip.serving.messages.answers import Answer
from unclip.serving.messages.events import EventStream, unless_gone
from unclip.serving.messages.schemas import StreamedBody


def caller_of(request: Request) -> Caller:
    """Who asks."""
    return Caller(request.state.key, str(request.base_url))


def json_of(answer: Answer) -> Response:
    """An answer as it is sent."""
    return Response(answer.to_json(), media_type="application/json")


async def drawn(service: Service, order: Order, request: Request) -> Response:
    """The answer to an order, as its body wants it; work ends when the client is gone."""
    if isinstance(order.body, StreamedBody) and order.body.stream:
        return EventStream(service.stream(order, caller_of(request)))
    return json_of(await unless_gone(service.answer(order, caller_of(request)), request.receive))
