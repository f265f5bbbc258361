"""Generate functions as users write them."""

from dataclasses import replace

from megatron_vespo.types import Segments


async def shorter_of_two(draw, prompt, sampling, seed):
    drawn = [await draw(prompt, sampling, seed + i) for i in range(2)]
    return min(drawn, key=lambda completion: len(completion.token_ids))


async def raises(draw, prompt, sampling, seed):
    return {}["no key"]


async def forgets(draw, prompt, sampling, seed):
    completion = await draw(prompt, sampling, seed)
    return replace(completion, token_ids=[*completion.token_ids, 5])


async def nothing(draw, prompt, sampling, seed):
    return None


def no_coroutine(draw, prompt, sampling, seed):
    return None


async def asks_again(draw, prompt, sampling, seed, context):
    first = await draw(prompt, sampling, seed)
    completion = await draw(prompt, sampling, seed, begun=first.with_given([6, 7], "environment"))
    data = {"tokenizer": context.tokenizer, "is_evaluation": context.is_evaluation}
    return replace(completion, reward_data=data)


async def given_alone(draw, prompt, sampling, seed):
    return replace(await draw(prompt, sampling, seed), segments=Segments.single("tool", 2))


async def other_segments(draw, prompt, sampling, seed):
    return replace(await draw(prompt, sampling, seed), segments=Segments.single("policy", 3))


async def too_long(draw, prompt, sampling, seed):
    completion = (await draw(prompt, sampling, seed)).with_given([6] * 7, "tool")
    return replace(completion, finish_reason="stop")


async def unfinished(draw, prompt, sampling, seed):
    return replace(await draw(prompt, sampling, seed), finish_reason="abort")


async def no_json(draw, prompt, sampling, seed):
    return replace(await draw(prompt, sampling, seed), reward_data={"seen": {1}})


async def two_parameters(draw, prompt):
    return None
