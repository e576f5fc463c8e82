"""Made-up names from outside the closed world: people, towns, dishes, ... that texts and instructions mention only once or twice.

Real instruction data mentions names by the thousand, and a model that learns from it learns to copy a name. The closed world has
fewer than two hundred; without others a model learns to choose one of them instead.
"""

import random
import re
from collections.abc import Collection

from mini.facts import KINDS, RELATIONS, Entity, Name, parse_names

# Syllables of transliterated names.
SYLLABLES = parse_names("""
カ | 卡 | ka; ラ | 拉 | la; ミ | 米 | mi; ノ | 诺 | no; ト | 托 | to; リ | 莉 | li; ダ | 达 | da; シ | 西 | si; モ | 莫 | mo; ン | 恩 | n
ル | 鲁 | lu; ベ | 贝 | be; ロ | 罗 | lo; ヤ | 雅 | ya; ニ | 尼 | ni; ソ | 索 | so; タ | 塔 | ta; ビ | 比 | bi; フ | 弗 | fu; ガ | 加 | ga
コ | 科 | ko; エ | 艾 | e; ナ | 娜 | na; ク | 克 | ku; ス | 斯 | su; ア | 阿 | a; イ | 伊 | i; オ | 奥 | o; ユ | 尤 | yu; ケ | 凯 | ke
セ | 塞 | se; ド | 多 | do; ネ | 内 | ne; パ | 帕 | pa; マ | 玛 | ma; ム | 姆 | mu; レ | 雷 | le; ワ | 瓦 | wa; テ | 特 | te; キ | 基 | ki
サ | 萨 | sa; ヒ | 希 | hi; グ | 格 | gu; ジ | 吉 | ji; バ | 巴 | ba; プ | 普 | pu; デ | 德 | de; ゴ | 戈 | go; メ | 梅 | me; ハ | 哈 | ha
""")
# Two parts of the names of everything else; a name is one of the first and one of the second.
FIRST_PARTS = parse_names("""
銀 | 银 | silver; 森 | 森 | forest; 月 | 月 | moon; 雪 | 雪 | snow; 風 | 风 | wind; 山 | 山 | mountain; 花 | 花 | flower; 水 | 水 | water
星 | 星 | star; 海 | 海 | sea; 霧 | 雾 | mist; 夜 | 夜 | night; 砂 | 沙 | sand; 光 | 光 | light; 雨 | 雨 | rain; 竹 | 竹 | bamboo
赤 | 红 | red; 青 | 蓝 | blue; 黒 | 黑 | black; 白 | 白 | white; 金 | 金 | golden; 石 | 石 | stone; 火 | 火 | fire; 朝 | 晨 | dawn
秋 | 秋 | autumn; 春 | 春 | spring; 冬 | 冬 | winter; 夏 | 夏 | summer; 雲 | 云 | cloud; 影 | 影 | shadow; 鏡 | 镜 | mirror; 橋 | 桥 | bridge
""")
SECOND_PARTS = {
    "town": parse_names("町 | 镇 | town; 村 | 村 | village; 港 | 港 | harbor; 谷 | 谷 | valley; 丘 | 丘 | hill; 浜 | 滨 | beach; 坂 | 坡 | slope; 原 | 原 | plain"),
    "animal": parse_names("""
ネコ | 猫 | cat; カラス | 鸦 | crow; ヘビ | 蛇 | snake; イヌ | 犬 | dog; シカ | 鹿 | deer; ウマ | 马 | horse; クマ | 熊 | bear; サル | 猴 | monkey
カメ | 龟 | turtle; カエル | 蛙 | frog; ウサギ | 兔 | rabbit; ネズミ | 鼠 | mouse; キツネ | 狐 | fox; フクロウ | 鸮 | owl; ツル | 鹤 | crane
"""),
    "dish": parse_names("""
スープ | 汤 | soup; パン | 面包 | bread; サラダ | 沙拉 | salad; カレー | 咖喱 | curry; うどん | 面 | noodles; まんじゅう | 馒头 | buns; 鍋 | 火锅 | hotpot
がゆ | 粥 | porridge; クッキー | 饼干 | cookies; ごはん | 饭 | rice; もち | 年糕 | rice cake; ぎょうざ | 饺子 | dumplings; パイ | 派 | pie
"""),
    "book": parse_names("""
の手紙 | 来信 | letters; の地図 | 的地图 | map; の図書館 | 图书馆 | library; の歌 | 之歌 | songs; の旅 | 之旅 | journey; の町 | 小镇 | village
の灯台 | 的灯塔 | lighthouse; の鐘 | 之钟 | bell; の秘密 | 的秘密 | secret; の空 | 的天空 | sky; の駅 | 车站 | station
"""),
    "event": parse_names("""
祭り | 节 | festival; の日 | 日 | day; 市 | 集市 | fair; の行列 | 巡游 | procession; 踏み | 踏会 | walk; 送り | 送会 | farewell; の結婚式 | 的婚礼 | wedding
"""),
}  # fmt: skip
LANGUAGES = ("ja", "zh", "en")
ENTITIES = {name for names in KINDS.values() for name in names}
RUDE = ["バカ", "クソ", "デブ", "シネ", "ハゲ"]  # what syllables must not spell
TAKEN = {
    language: re.compile("|".join(re.escape(name[language]) for name in ENTITIES) + "|" + "|".join(RUDE), re.IGNORECASE)
    for language in LANGUAGES
}


def make_stranger(kind: str, rng: random.Random, known: Collection[Name]) -> Entity:
    """An entity of a kind whose name contains no name of the world in any language, with facts drawn at random.

    Args:
        known: names of entities that its facts may name, beside the items of closed lists.
    """
    while True:
        name = _transliterated(rng) if kind == "person" or (kind != "book" and rng.random() < 0.3) else Name("", "", "")
        if kind != "person":
            first, second = name if name.ja else rng.choice(FIRST_PARTS), rng.choice(SECOND_PARTS[kind])
            if name.ja or rng.random() < 0.3:
                other = rng.choice(FIRST_PARTS)
                first = Name(first.ja + other.ja, first.zh + other.zh, f"{first.en} {other.en}")
            name = Name(first.ja + second.ja, first.zh + second.zh, f"{first.en} {second.en}")
            if kind in ("book", "event", "town"):
                name = Name(name.ja, name.zh, name.en.title())
        if not any(TAKEN[language].search(name[language]) for language in LANGUAGES):
            break
    facts = {
        relation: rng.choice([value for value in values if value in known or value not in ENTITIES])
        for relation, values in RELATIONS[kind].items()
    }
    return Entity(kind, name, False, facts=facts)


def _transliterated(rng: random.Random) -> Name:
    parts = rng.sample(SYLLABLES, rng.choice([2, 2, 3, 3, 4]))
    ja, zh, en = ("".join(part[language] for part in parts) for language in LANGUAGES)
    return Name(ja, zh, en.capitalize()) if not ja.startswith("ン") else _transliterated(rng)
