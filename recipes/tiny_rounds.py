"""Three rounds of feedback on the tiny world: the policy's own answers are labelled, and training goes on.

    rlhf-recipes run tiny-rounds
    rlhf-recipes run tiny-rounds rounds.labeler=people

The first round is `tiny` with fewer labels, a third of its PPO updates and half its KL penalty. After it, and after
the second, the simulated labelers choose between two answers of the policy to each of 600 fresh prompts, the reward
model is trained anew on all comparisons so far, and PPO goes on. A reward model that saw only other people's answers
is gamed where the policy leaves them; here it learns of the policy's own.

Hardware: 2 idle CPU cores, two minutes, and one more for the base.

Sources: [T] tuned on this world. Labels of the current policy, round after round: InstructGPT, arXiv:2203.02155, and
Bai et al., arXiv:2204.05862.
"""

from rlhf_recipes import load, main, replace

recipe = replace(
    load("tiny"),
    name="tiny-rounds",
    reward={"limit": 600},  # [T]
    ppo={
        "total_episodes": 2560,  # [T]: 20 updates a round
        "kl_coef": 0.05,  # [T]: at 0.02 one round with as many labels is gamed, at 0.1 the policy hardly moves
        "eval_steps": 10,
    },
    rounds={
        "labeler": "rlhf_recipes.worlds.tiny:labeler",
        "count": 3,
        "size": 600,  # in each round as many labels as the first has
        "responses": 2,
    },
)

if __name__ == "__main__":
    main(recipe)
