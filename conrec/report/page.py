"""The words and the style of report.html: what each picture and table asks the reader to look for.

Invariant: no caption claims a result. It says what better looks like, and what would be a warning.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --line: #8885; --quiet: #6b6b6b; --ours: #fbe9df; --group: #f1f2f4; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --quiet: #a0a0a0; --ours: #3a2418; --group: #22262b; --page: #16181b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--page); line-height: 1.5;
       font-family: system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.75rem; } h3 { font-size: 1rem; }
figure { margin: 1rem 0; } figcaption, .note { color: var(--quiet); font-size: .9rem; max-width: 44rem; }
p { max-width: 44rem; } svg { width: 100%; max-width: 36rem; height: auto; display: block; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
         vertical-align: top; }
th { font-weight: 600; } .facts th { font-weight: 400; color: var(--quiet); }
.words, .facts th, .facts td, .systems :is(th, td):nth-child(2) { text-align: left; white-space: normal; }
.facts td { overflow-wrap: anywhere; } .words { min-width: 9rem; } .word { text-align: left; }
.verdict td { font-size: 1.1rem; } .verdict td small { font-size: .75rem; } .verdict :is(th, td):first-child {
  text-align: left; } .verdict tr.served td { background: var(--ours); }
.systems :is(th, td):nth-child(2) { position: sticky; left: 0; background: var(--page); min-width: 8.5rem;
                                    max-width: 16rem; }
td small { display: block; color: var(--quiet); font-size: .72rem; line-height: 1.3; }
.systems tr.ours td { background: var(--ours); } .systems tr.ours td:nth-child(2) { font-weight: 600; }
.systems tr.group td { background: var(--group); font-size: .8rem; color: var(--quiet); }
.systems tr.group td:nth-child(2) { white-space: nowrap; max-width: 8.5rem; }
.dot { display: inline-block; width: .6em; height: .6em; border-radius: 50%; margin-right: .4em; }
.key p { font-size: .85rem; margin: .5rem 0; } .key span { margin-right: .6rem; }
figcaption { margin-top: .5rem; } .notes { font-size: .85rem; color: var(--quiet); max-width: 44rem; }
.key i { font-style: normal; color: var(--quiet); font-variant-numeric: tabular-nums; }
"""

CAPTIONS = {
    "verdict": "Coming means: first shown in the days after the cut, and then rejected or liked. Spared: the list "
    "held it, so it would not have been shown; lost the same way. Under each number its 95 % interval by user. A "
    "smaller alpha promises fewer lost likes, and spares less. A list is worth having where it spares a larger share "
    "than it loses.",
    "published": "Up and to the left is better. A curve is one system at every length of its lists, the band its 95 % "
    "interval by user; dots are promises (α) that can be served. On the dashed diagonal lies a list that is drawn by "
    "chance: it blocks rejections and likes alike. Bands that overlap may still differ beyond chance, since all "
    "systems meet the same users: the paired differences below say it.",
    "examples": "Three users by the largest score of their lists: sure, middling, unsure. Odds are those of a "
    "rejection against a like, if it is shown. Because of: what raises these odds the most over what is usual. Only "
    "what was shown in the window can be right or wrong; what is blocked for good reason is mostly not shown.",
    "published systems": "Catch: share of later rejections that are blocked when each system blocks as much as it can "
    "while that share of later likes is. AUC: how often a later rejection scores above a later like, of any users, "
    "and within-user AUC of the same user; .5 is by chance. Thin: where little is counted.",
    "published lists": "False block, pooled: share of all later likes that are blocked. Mean of users: each user's "
    "share first, then their mean, which is what alpha promises. Selectivity: catch / pooled false block, 1 by chance. "
    "Lengths: items predicted for the user at that place of the order by length; none: share of users without any; of "
    "served users who rejected or liked something in the window, not of those who were gone by then.",
    "published against": "On the same resamples of users, and at each system's own threshold. Bold: the interval "
    "leaves 0 out, a difference beyond chance.",
    "published ratios": "Above 1 ours catches more. An interval that holds 1 is a difference that chance may make.",
    "score odds": "Weights of the log odds of a rejection against a like. Above 0: the more of it, the likelier a "
    "rejection. Shares and odds count by their logarithms; columns that say alike share what they say between them, so "
    "a single weight says little. With the policy: where it was asked about the item.",
    "score exposure": "Weights of how likely the user is shown the item. It counts {reach} times beside the odds: a "
    "list is spent on what would be shown.",
    "thresholds": "Items of at least this score are blocked. In brackets: the mean share of a user's later likes that "
    "it blocks where it was calibrated, which must lie below alpha. “Nothing is predicted”: too few users to promise "
    "it. A stratum of too few users takes the threshold of all.",
    "frontier": "Up and to the left is better: more rejections caught, fewer likes lost. Read height and place "
    "together: a floor such as what is most shown stands high because everybody sees those items, and for the same "
    "reason far to the right, near the dashed line where a list costs a like as often as it catches a rejection. "
    "Crosses are 95 % intervals by user. A line joins the settings of one system that trades one for the other; a "
    "system is better than another where its line lies above.",
    "ratio": "The full method is set to cost just as many likes as each system costs, and catches this many times "
    "what that system catches, with 95 % intervals of the paired ratio. What has several settings is a frontier; which "
    "of them it has is chosen on one half of the users and read on the other. Right of the solid line it catches more, "
    "right of the dashed one as much more as aimed at. Orange: beyond chance; blue: theirs is better beyond chance; "
    "grey: chance may be the reason. The hardest systems to beat are on top; one that catches nothing has no ratio. "
    "Rows named “our odds added” are the other policies with the odds that ours is scored with beside them; “CoNRec "
    "without the policy” is those odds without any policy.",
    "catch_ratio": "The same when every system blocks by its own score, as much as it can while losing at most 1 % of "
    "the later likes. Ours takes part as the full method, as it is served.",
    "catch": "Each system blocks what it scores highest, ever more of it. Higher is better; at the dashed line one "
    "later like in a hundred is lost, where the curves stand in the order of the legend. Further right costs are "
    "higher than anyone would serve.",
    "systems": "Under each figure its 95 % bootstrap interval by user. Bold: the best of the column. FHR is the share "
    "of lists that catch something the user rejects later, FPH the share that hold something the user likes later: "
    "the harm. Lift is FHR / FPH; a list that hits next to nothing can have a high one. Catch at 1 %: share of later "
    "rejections blocked while at most 1 % of later likes are. Choice, likelihood and served: how often a later "
    "rejection is picked out of at most 20 items shown on the same day, by an answer, by its score, and by its "
    "likeness to what is served; a guess is right as often as the facts on top say. A dash: the system does not "
    "define it.",
    "ablation": "What each step adds to the one before it, with 95 % intervals on the same resamples of users. A step "
    "helps where FHR (orange) lies right of the line or FPH (blue) left of it; an interval across the line is a "
    "difference that chance may have made. Both moving the same way is a trade, not a gain: Lift says which.",
    "differences": "On the same resamples of users. Bold: the interval leaves 0 out, a difference beyond chance.",
    "coverage": "Share of targets that hold an item of the user's strongest negative interests. The difference "
    "between rows is what a wider target can gain at most; a wider one is also covered more often by chance.",
    "responsiveness": "Users are served twice, the second time with one more event. After a rejection the newly "
    "blocked items (orange) should be like the rejected one far more often than what was blocked before (grey); after "
    "a like, the newly unblocked ones (blue). Liked later: what the change costs, and what it saves.",
    "forgetting": "Held-out alignment questions after each phase. A line that falls is a system that forgets what "
    "its semantic IDs mean while it learns to rank.",
    "verdict_auc": "How well the verdict tells later rejections from later likes, validation users, after each phase; "
    ".5 (dotted) is chance. GRPO trains the generator alone: a line that falls there is a judge that is lost.",
    "supervised": "Supervised training. The loss falls within each phase and jumps where another task begins; "
    "accuracy on held-out alignment questions that falls in a later phase is forgetting.",
    "grpo": "Progressive GRPO. A rising reward is only progress where validation FHR stays and FPH falls. "
    "KL shows how far the policy has moved; entropy that collapses, or one ID in most groups, "
    "means that the reward is being farmed. Dotted lines are the borders of stages.",
    "quality": "Few codes used, a high collision rate or neighbours lost by quantisation limit what any "
    "policy over these semantic IDs can tell apart.",
}
"""By the name of the picture or table."""
