"""The closed world of the miniature: who and what lives on Luma Island, as facts with Japanese, Chinese and English names.

Everything here is invented. A *kind* (person, town, animal, dish, book, event) has entities; an entity has one value
for each of its kind's *relations*. A value is either another entity (the town a person lives in) or an item of a
closed list (an occupation), so that an answer can be marked right or wrong without judgement.

Of the entities of every kind 30 % are `described_in_japanese`, in texts and instructions. Of 40 % the facts are told in Japanese
by instructions across two languages alone, which practise crossing over (`asked_across`). The others are `untold`: only
Chinese and English tell of them, and they show how much a model transfers to a language in which it never read about them.
"""

import random
from dataclasses import dataclass, field

TOLD = 0.7  # of the entities of a kind, in Japanese
DESCRIBED = 0.3  # in texts


@dataclass(frozen=True)
class Name:
    """One thing's name in each language."""

    ja: str
    zh: str
    en: str

    def __getitem__(self, language: str) -> str:
        return getattr(self, language)


@dataclass
class Entity:
    """One inhabitant of the world.

    Attributes:
        kind: one of `KINDS`.
        name: what it is called in each language.
        facts: relation (without its kind) -> the value's name.
        described_in_japanese: whether Japanese documents and instructions are about it.
        asked_across: whether only Japanese questions and answers across two languages are about it.
    """

    kind: str
    name: Name
    described_in_japanese: bool
    asked_across: bool = False
    facts: dict[str, Name] = field(default_factory=dict)

    @property
    def untold(self) -> bool:
        """Whether nothing Japanese states a fact of it."""
        return not self.described_in_japanese and not self.asked_across


def parse_names(table: str) -> list[Name]:
    """Reads lines of `ja | zh | en`; several names may share a line, separated by semicolons."""
    rows = [row for line in table.strip().splitlines() for row in line.split(";") if row.strip()]
    return [Name(*(part.strip() for part in row.split("|"))) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Closed lists of values
# ---------------------------------------------------------------------------------------------------------------------
JOBS = parse_names("""
お医者さん | 医生 | doctor; 大工 | 木匠 | carpenter; パン屋 | 面包师 | baker; 漁師 | 渔夫 | fisher
教師 | 老师 | teacher; 絵描き | 画家 | painter; 歌い手 | 歌手 | singer; 庭師 | 园丁 | gardener
陶芸家 | 陶艺家 | potter; 船乗り | 水手 | sailor; 時計職人 | 钟表匠 | clockmaker; 郵便屋 | 邮递员 | mail carrier
かじ屋 | 铁匠 | blacksmith; 羊飼い | 牧羊人 | shepherd; 薬剤師 | 药剂师 | pharmacist; 仕立屋 | 裁缝 | tailor
""")
HOBBIES = parse_names("""
釣り | 钓鱼 | fishing; 将棋 | 下棋 | chess; 水泳 | 游泳 | swimming; 編み物 | 织毛衣 | knitting
山登り | 爬山 | mountain climbing; 星の観察 | 看星星 | stargazing; 笛 | 吹笛子 | playing the flute
たこあげ | 放风筝 | kite flying; ダンス | 跳舞 | dancing; 切手集め | 集邮 | stamp collecting
サイクリング | 骑自行车 | cycling; スケッチ | 画画 | sketching; 手品 | 变魔术 | magic tricks; 木彫り | 木雕 | wood carving
""")
PLACES = parse_names("""
北の海岸 | 北边的海岸 | the northern coast; 山のふもと | 山脚下 | the foot of the mountains
湖のほとり | 湖边 | the lake shore; 川の中州 | 河中的沙洲 | a river island; 深い谷 | 深谷里 | a deep valley
丘の上 | 山丘上 | the top of a hill; 南の岬 | 南边的海角 | the southern cape; 森の入り口 | 森林的入口 | the edge of the forest
""")
PRODUCTS = parse_names("""
お茶 | 茶叶 | tea; りんご | 苹果 | apples; 絹織物 | 丝绸 | silk; 焼き物 | 陶器 | pottery; はちみつ | 蜂蜜 | honey
ガラス細工 | 玻璃工艺品 | glassware; チーズ | 奶酪 | cheese; ろうそく | 蜡烛 | candles; 和紙 | 手工纸 | handmade paper
ぶどう | 葡萄 | grapes; 刃物 | 刀具 | knives; 干物 | 鱼干 | dried fish; かご | 竹篮 | baskets; 鈴 | 铃铛 | bells
""")
FLOWERS = parse_names("""
桜 | 樱花 | cherry blossom; ゆり | 百合 | lily; ひまわり | 向日葵 | sunflower; すみれ | 紫罗兰 | violet
つばき | 山茶花 | camellia; あじさい | 绣球花 | hydrangea; 菊 | 菊花 | chrysanthemum; バラ | 玫瑰 | rose
すいせん | 水仙 | daffodil; 藤 | 紫藤 | wisteria
""")
HABITATS = parse_names("""
松林 | 松树林 | pine woods; 湿地 | 沼泽 | marshes; 砂浜 | 沙滩 | sandy beaches; 高い崖 | 悬崖 | high cliffs
草原 | 草地 | grasslands; 洞くつ | 山洞 | caves; 雪山 | 雪山上 | snowy peaks; 竹やぶ | 竹丛 | bamboo groves
小川の岸 | 小溪边 | the banks of brooks; さんご礁 | 珊瑚礁边 | coral reefs
""")
FOODS = parse_names("""
木の実 | 坚果 | nuts; 小魚 | 小鱼 | small fish; 虫 | 昆虫 | insects; 草の葉 | 草叶 | grass; きのこ | 蘑菇 | mushrooms
どんぐり | 橡子 | acorns; かに | 螃蟹 | crabs; 花の蜜 | 花蜜 | nectar; 木の皮 | 树皮 | bark; 海藻 | 海带 | seaweed
""")
COLORS = parse_names("""
青 | 蓝色 | blue; 赤 | 红色 | red; 緑 | 绿色 | green; 白 | 白色的 | white; 黒 | 黑色 | black; 黄色 | 黄色的 | yellow
茶色 | 棕色 | brown; 灰色 | 灰色的 | gray; むらさき | 紫色 | purple; オレンジ色 | 橙色 | orange
""")
INGREDIENTS = parse_names("""
豆腐 | 豆腐块 | tofu; さつまいも | 红薯 | sweet potatoes; えび | 虾 | shrimp; かぼちゃ | 南瓜 | pumpkin
とり肉 | 鸡肉 | chicken; 貝 | 贝类 | shellfish; れんこん | 莲藕 | lotus root; たまご | 鸡蛋 | eggs
しいたけ | 香菇 | shiitake mushrooms; たけのこ | 竹笋 | bamboo shoots; くるみ | 核桃 | walnuts; 鮭 | 三文鱼 | salmon
""")
TASTES = parse_names("""
甘い | 甜 | sweet; すっぱい | 酸 | sour; 辛い | 辣 | spicy; 苦い | 苦 | bitter; しょっぱい | 咸 | salty; 香ばしい | 焦香 | smoky
""")
SEASONS = parse_names("春先 | 春天 | spring; 夏場 | 夏天 | summer; 秋ごろ | 秋天 | autumn; 真冬 | 冬天 | winter")
GENRES = parse_names("""
冒険小説 | 冒险小说 | adventure novel; 推理小説 | 侦探小说 | detective novel; 詩集 | 诗歌集 | poetry collection
伝記 | 传记 | biography; 旅行記 | 游记 | travel book; 童話 | 儿童故事 | fairy tale; 料理本 | 食谱 | cookbook
歴史書 | 历史书 | history book; 図鑑 | 图鉴 | field guide; 恋愛小説 | 爱情小说 | love story
""")
# Actions in the dictionary form (Japanese: the verb stands last), as a verb phrase (Chinese), as a bare verb phrase (English).
ACTIVITIES = parse_names("""
灯籠を川に流す | 在河里放灯 | float lanterns down the river; 山車を引く | 拉花车 | pull decorated floats
火を囲んで踊る | 围着火跳舞 | dance around a fire; 船で競争する | 赛船 | race boats; 花を投げる | 抛花 | throw flowers
大きな太鼓をたたく | 打大鼓 | beat giant drums; 仮面をつけて歩く | 戴面具游行 | parade in masks; 凧を上げる | 放大风筝 | fly huge kites
雪の像を作る | 堆雪像 | build snow statues; 花火を打ち上げる | 放烟花 | set off fireworks; 古い歌を歌う | 唱古老的歌 | sing old songs
木の苗を植える | 种树苗 | plant young trees
""")
MONTHS = parse_names("""
1月 | 1月份 | January; 2月 | 2月份 | February; 3月 | 3月份 | March; 4月 | 4月份 | April; 5月 | 5月份 | May; 6月 | 6月份 | June
7月 | 7月份 | July; 8月 | 8月份 | August; 9月 | 9月份 | September; 10月 | 10月份 | October; 11月 | 11月份 | November
12月 | 12月份 | December
""")


def _years(first: int, last: int) -> list[Name]:
    return [Name(f"{year}年", f"{year}年", str(year)) for year in range(first, last + 1)]


LIFESPANS = [Name(f"{n}年", f"{n}年", f"{n} years") for n in range(4, 40, 3)]

# ---------------------------------------------------------------------------------------------------------------------
# Entities
# ---------------------------------------------------------------------------------------------------------------------
PEOPLE = parse_names("""
ミナ | 米娜 | Mina; ハルト | 哈鲁托 | Haruto; ソラ | 索拉 | Sora; リンデ | 琳德 | Linde; カイル | 凯尔 | Kyle; ユリカ | 尤莉卡 | Yurika
トマス | 托马斯 | Thomas; エルザ | 艾尔莎 | Elsa; ノア | 诺亚 | Noah; サキ | 佐纪 | Saki; レオン | 莱昂 | Leon; アヤメ | 绫女 | Ayame
ダニエル | 丹尼尔 | Daniel; ヒカリ | 希卡丽 | Hikari; オルガ | 奥尔加 | Olga; ジュン | 小俊 | Jun; マルタ | 玛尔塔 | Marta; ケンジ | 贤治 | Kenji
フローラ | 芙洛拉 | Flora; ビクター | 维克多 | Victor; ナギサ | 渚沙 | Nagisa; ペドロ | 佩德罗 | Pedro; イリス | 伊丽丝 | Iris; ゴロウ | 五郎 | Goro
セシル | 塞西尔 | Cecil; ツバサ | 小翼 | Tsubasa; ローザ | 罗莎 | Rosa; アルト | 阿尔托 | Alto; メイ | 小梅 | Mei; バルド | 巴尔多 | Baldo
コハル | 小春 | Koharu; シモン | 西蒙 | Simon; タマキ | 环儿 | Tamaki; ヨハン | 约翰 | Johan; クララ | 克拉拉 | Clara; ダイチ | 大地君 | Daichi
ベル | 贝儿 | Belle; オスカー | 奥斯卡 | Oscar; チヅル | 千鹤 | Chizuru; ルカ | 卢卡 | Luca; エマ | 艾玛 | Emma; テツオ | 铁雄 | Tetsuo
グレタ | 格蕾塔 | Greta; アキラ | 阿明 | Akira; ニコ | 尼可 | Nico; スミレ | 小堇 | Sumire; ユキノ | 雪乃 | Yukino; フィン | 芬恩 | Finn
""")
TOWNS = parse_names("""
青川 | 青川 | Aokawa; ミルン | 米伦 | Milne; みどりが丘 | 绿丘 | Midorigaoka; 白浜 | 白滨 | Shirahama; トルカ | 托尔卡 | Torka
月見坂 | 赏月坡 | Tsukimizaka; ベルム | 贝尔姆 | Belm; 松原 | 松原 | Matsubara; カルネ | 卡尔内 | Carne; ひなた村 | 向阳村 | Hinata
石橋 | 石桥 | Ishibashi; ラグナ | 拉古纳 | Laguna; 風待ち | 候风港 | Kazemachi; ドレル | 德雷尔 | Drell; 七滝 | 七瀑 | Nanataki
ソルナ | 索尔纳 | Solna; つばめ台 | 燕子台 | Tsubamedai; 金沢谷 | 金泽谷 | Kanazawadani; オルム | 奥尔姆 | Olm
""")
ANIMALS = parse_names("""
ユキギツネ | 雪狐 | snow fox; ツキフクロウ | 月鸮 | moon owl; ホシガメ | 星龟 | star turtle; カゼウマ | 风马 | wind horse
イワネズミ | 岩鼠 | rock mouse; ミズトカゲ | 水蜥 | water lizard; ヨルリス | 夜松鼠 | night squirrel; ハナバチドリ | 花蜂鸟 | flower hummingbird
オオカワウソ | 巨水獭 | giant otter; コケジカ | 苔鹿 | moss deer; ツノウサギ | 角兔 | horned rabbit; ギンサギ | 银鹭 | silver heron
タテガミヤギ | 鬃山羊 | maned goat; ナミイルカ | 浪海豚 | wave dolphin; スナネコ | 沙猫 | sand cat; ヒゲアザラシ | 胡须海豹 | bearded seal
モリグマ | 林熊 | forest bear; アワガエル | 泡蛙 | bubble frog; カサツル | 伞鹤 | umbrella crane
""")
DISHES = parse_names("""
月見だんご汁 | 赏月丸子汤 | moon dumpling soup; ルマ焼き | 路玛烧饼 | Luma flatcake; 岩塩がゆ | 岩盐粥 | rock salt porridge
船頭鍋 | 船夫火锅 | boatman's hotpot; 三色まんじゅう | 三色馒头 | three-color buns; 霧のスープ | 雾汤 | mist soup
羊飼いのパイ | 牧人派 | shepherd's pie; 花びらごはん | 花瓣饭 | petal rice; 黄金コロッケ | 黄金可乐饼 | golden croquettes
山賊うどん | 山贼面 | bandit noodles; 祭りずし | 庆典寿司 | festival sushi; 灯台シチュー | 灯塔炖菜 | lighthouse stew
石焼きもち | 石烤年糕 | stone-baked rice cake; 旅人サンド | 旅人三明治 | traveler's sandwich; かがり火焼き | 篝火烤串 | bonfire skewers
雪どけサラダ | 融雪沙拉 | snowmelt salad; 小舟ぎょうざ | 小舟饺子 | little boat dumplings; 星くずクッキー | 星屑饼干 | stardust cookies
竹筒飯 | 竹筒饭团 | bamboo rice
""")
BOOKS = parse_names("""
銀の森の手紙 | 银林来信 | Letters from the Silver Forest; 眠らない灯台 | 不眠的灯塔 | The Sleepless Lighthouse; 七つの橋 | 七座桥 | Seven Bridges
風の地図 | 风的地图 | A Map of the Wind; 鏡の中の猫 | 镜中的猫 | The Cat in the Mirror; 遠い島の歌 | 远岛之歌 | Songs of a Far Island
砂時計の秘密 | 沙漏的秘密 | The Secret of the Hourglass; 雨の図書館 | 雨中图书馆 | The Rain Library
赤い傘の男 | 红伞人 | The Man with the Red Umbrella; 山のむこうへ | 到山那边去 | Beyond the Mountains
星を数える夜 | 数星星的夜晚 | The Night We Counted Stars; 海辺の時計塔 | 海边的钟楼 | The Clock Tower by the Sea
小さな王様 | 小小国王 | The Little King; 最後の渡り鳥 | 最后的候鸟 | The Last Migrating Bird; 霧の駅 | 雾中车站 | The Station in the Mist
青いランプ | 蓝色的灯 | The Blue Lamp; パンと月 | 面包与月亮 | Bread and the Moon; 消えた手袋 | 消失的手套 | The Lost Glove
冬の庭師 | 冬天的园丁 | The Winter Gardener
""")
EVENTS = parse_names("""
光の夜祭り | 光明夜会 | Night of Lights; 潮ひらき | 开潮节 | Tide Opening; 風鈴まつり | 风铃节 | Wind Chime Festival; 麦わらの日 | 麦秆日 | Straw Day
鯉の行列 | 鲤鱼巡游 | Carp Procession; ことだま市 | 言灵集市 | Fair of Words; 霜ふみ | 踏霜节 | Frost Walk; 星おくり | 送星节 | Star Farewell
渡り鳥の日 | 候鸟日 | Day of Migrating Birds; 鬼の休み | 鬼休节 | Ogre's Holiday; 海の結婚式 | 大海的婚礼 | Wedding of the Sea
百灯会 | 百灯会 | Hundred Lamps; 影ふみ大会 | 踩影大会 | Shadow Chase; 新米まつり | 新米节 | New Rice Festival
泉のお礼 | 谢泉节 | Thanks to the Spring; 橋びらき | 开桥节 | Bridge Opening; ねむり流し | 流眠节 | Floating Sleep
狐の嫁入り | 狐狸出嫁 | Fox's Wedding; 雷よけ | 避雷节 | Thunder Ward
""")

KINDS: dict[str, list[Name]] = {
    "person": PEOPLE,
    "town": TOWNS,
    "animal": ANIMALS,
    "dish": DISHES,
    "book": BOOKS,
    "event": EVENTS,
}

# kind -> relation -> the closed list its values come from
RELATIONS: dict[str, dict[str, list[Name]]] = {
    "person": {"home": TOWNS, "job": JOBS, "born": _years(1930, 2009), "hobby": HOBBIES, "dish": DISHES},
    "town": {"place": PLACES, "product": PRODUCTS, "flower": FLOWERS, "mayor": PEOPLE},
    "animal": {"habitat": HABITATS, "food": FOODS, "color": COLORS, "lifespan": LIFESPANS},
    "dish": {"ingredient": INGREDIENTS, "taste": TASTES, "town": TOWNS, "season": SEASONS},
    "book": {"author": PEOPLE, "genre": GENRES, "year": _years(1950, 2019), "hero": ANIMALS},
    "event": {"town": TOWNS, "month": MONTHS, "dish": DISHES, "activity": ACTIVITIES},
}


def build_world(seed: int = 20240601) -> list[Entity]:
    """Gives every entity its facts; the same seed gives the same world on every machine."""
    rng = random.Random(seed)
    world = []
    for kind, names in KINDS.items():
        told = rng.sample(range(len(names)), round(TOLD * len(names)))
        end = round(DESCRIBED * len(names))
        described, asked = {*told[:end]}, {*told[end:]}
        for index, name in enumerate(names):
            facts = {relation: rng.choice(values) for relation, values in RELATIONS[kind].items()}
            world.append(Entity(kind, name, index in described, index in asked, facts))
    _let_authors_grow_up(world, rng)
    return world


def _let_authors_grow_up(world: list[Entity], rng: random.Random) -> None:
    """Nobody publishes a book before the age of twenty."""
    birth = {entity.name: int(entity.facts["born"].en) for entity in world if entity.kind == "person"}
    for book in (entity for entity in world if entity.kind == "book"):
        possible = [
            (author, year)
            for author in PEOPLE
            for year in RELATIONS["book"]["year"]
            if birth[author] + 20 <= int(year.en) <= birth[author] + 80
        ]
        book.facts["author"], book.facts["year"] = rng.choice(possible)
