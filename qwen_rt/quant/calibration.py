"""The built-in calibration text: English, Chinese and code, so that GPTQ sees what Qwen is used for. Our own words."""

ENGLISH = """\
The harbour town had two clocks, and they never agreed. The one on the customs house was set by the captains, who \
wanted to know when the tide would turn; the one on the church was set by the priest, who did not. Visitors learned to \
ask which clock was meant before they promised to be anywhere. In 1874 a railway came, brought a third time with it, \
and for a year nobody was late, because nobody could prove it.

A lake freezes from the top because water is heaviest at about four degrees Celsius. As the surface cools past that \
point it stops sinking, stays where it is, and finally turns to ice, which floats. Were it otherwise, lakes would fill \
with ice from the bottom up, and few fish would see a spring. The ice also keeps the cold out: ten centimetres of it \
slow the loss of heat enough that a pond of ordinary depth rarely freezes through.

To bake the bread, mix 500 g of flour, 10 g of salt, 7 g of dry yeast and 330 ml of lukewarm water. Knead for ten \
minutes, cover the bowl and let the dough rise until it has doubled, which takes an hour in a warm kitchen and three \
in a cold one. Shape it, let it rest for another half hour, and bake at 230 degrees for 35 minutes.

User: What is the difference between a list and a tuple in Python?
Assistant: Both hold items in order. A list can be changed after it was made: you can append to it, sort it or replace \
an element. A tuple cannot, so it can serve as a key of a dictionary. Use a list for many things of one kind, and a \
tuple for a few things that belong together, such as the two coordinates of a point. For example, 17 * 24 = 408, and \
(17, 24) is a pair of factors.

The contract may be ended by either party with three months' notice in writing. Until then, the supplier shall keep \
the service available for at least 99.5 percent of each calendar month, measured at the point where the customer's \
network begins. Planned maintenance that was announced a week before does not count. Fees already paid for a time \
after the end are returned within thirty days.
"""

CHINESE = """\
小镇的图书馆只有一间屋子，靠窗摆着两张长桌。每天下午三点，退休的语文老师会准时走进来，先擦一擦眼镜，再从书架的第二层取下那本没有读完的小说。\
他说书读得慢一点不要紧，要紧的是合上书的时候，心里还留着几句话。孩子们不太明白，只觉得他翻页的声音很好听。

水在摄氏四度左右密度最大，所以湖面总是先结冰，而湖底仍然保持着液态。冰层像一床被子，挡住了外面的寒气，鱼才能安然过冬。如果冰比水重，\
情况就完全不同了：冰会一层一层沉到湖底，整个湖泊都可能冻透。

问：请用三句话介绍一下长江。
答：长江是中国最长的河流，全长约六千三百公里，发源于青藏高原，最后在上海附近流入东海。它流经十一个省、自治区和直辖市，养育了沿岸数亿人口。\
千百年来，长江既是交通运输的要道，也是诗人笔下常见的风景。

安装之前，请先确认系统里已经有 Python 3.10 或更高的版本，并预留至少 8 GB 的磁盘空间。\
第一步，下载安装包并核对校验值；第二步，在命令行里运行安装程序；第三步，重新打开终端，输入版本命令检查是否成功。如果出现“权限不足”的提示，可以改用虚拟环境，不要直接用管理员账户安装。

今年第二季度，公司实现营业收入 12.6 亿元，同比增长 8.3%；净利润为 1.94 亿元，比去年同期略有下降，\
主要原因是原材料价格上涨和研发投入增加。管理层表示，下半年将继续控制成本，同时加快新产品上市的速度。
"""

CODE = '''\
import csv
from collections import defaultdict
from pathlib import Path


class Ledger:
    """Accounts by name, in cents."""

    def __init__(self, opening: dict[str, int] | None = None) -> None:
        self.balances: dict[str, int] = defaultdict(int, opening or {})
        self.entries: list[tuple[str, str, int]] = []

    def transfer(self, source: str, target: str, cents: int) -> None:
        if cents <= 0:
            raise ValueError(f"cannot transfer {cents} cents")
        if self.balances[source] < cents:
            raise RuntimeError(f"{source} has only {self.balances[source] / 100:.2f}")
        self.balances[source] -= cents
        self.balances[target] += cents
        self.entries.append((source, target, cents))

    def save(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            writer.writerow(["from", "to", "cents"])
            writer.writerows(self.entries)


def binary_search(items, wanted):
    low, high = 0, len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == wanted:
            return middle
        if items[middle] < wanted:
            low = middle + 1
        else:
            high = middle - 1
    return -1

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    long total = 0;
    for (int i = 1; i < argc; ++i) {
        char *end = NULL;
        long value = strtol(argv[i], &end, 10);
        if (*end != '\\0') {
            fprintf(stderr, "not a number: %s\\n", argv[i]);
            return EXIT_FAILURE;
        }
        total += value;
    }
    printf("%ld\\n", total);
    return 0;
}

SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS spent
FROM customers AS c LEFT JOIN orders AS o ON o.customer_id = c.id
WHERE o.created_at >= '2024-01-01' GROUP BY c.name HAVING COUNT(o.id) > 3 ORDER BY spent DESC LIMIT 20;

export async function fetchJson(url, { retries = 2, signal } = {}) {
  for (let attempt = 0; ; attempt++) {
    try {
      const response = await fetch(url, { signal });
      if (!response.ok) throw new Error(`HTTP ${response.status}`);
      return await response.json();
    } catch (error) {
      if (attempt >= retries) throw error;
      await new Promise((resolve) => setTimeout(resolve, 100 * 2 ** attempt));
    }
  }
}
'''

TEXTS = (ENGLISH, CHINESE, CODE)
"""Together about 2000 tokens."""
