"""The units that are known, and the words that turn or spoil a quantity. Tables only."""

from __future__ import annotations

from fractions import Fraction

from llmdistill.verify.answers.vocabulary import word_set

Dimensions = tuple[tuple[str, int], ...]

# name | factor to the base units | dimensions | other names
_TABLE = """
m | 1 | length | meter metre
cm | 1/100 | length | centimeter centimetre
mm | 1/1000 | length | millimeter millimetre
km | 1000 | length | kilometer kilometre kms
dm | 1/10 | length | decimeter decimetre
nm | 1/1000000000 | length | nanometer nanometre
μm | 1/1000000 | length | um mum micrometer micrometre micron
pm | 1/1000000000000 | length |
in | 127/5000 | length | inch inches
ft | 381/1250 | length | foot feet
yd | 1143/1250 | length | yard
mi | 201168/125 | length | mile
Å | 1/10000000000 | length | angstrom
ly | 9460730472580800 | length | lightyear
AU | 149597870700 | length | au
g | 1 | mass | gram gramme
kg | 1000 | mass | kilogram kilogramme kilo kgs
mg | 1/1000 | mass | milligram
μg | 1/1000000 | mass | microgram
t | 1000000 | mass | tonne
lb | 45359237/100000 | mass | lbs pound
oz | 45359237/1600000 | mass | ounce
ton | 45359237/50 | mass | tons
s | 1 | time | sec second secs
ms | 1/1000 | time | millisecond
μs | 1/1000000 | time | microsecond
ns | 1/1000000000 | time | nanosecond
min | 60 | time | minute mins
h | 3600 | time | hr hour hrs
day | 86400 | time | days d
week | 604800 | time | weeks
fortnight | 1209600 | time |
month | 1 | months | months
year | 12 | months | years yr yrs
decade | 120 | months |
century | 1200 | months | centuries
A | 1 | current | ampere amp
mA | 1/1000 | current | milliampere
K | 1 | temperature | kelvin
celsius | 1 | celsius | °C
fahrenheit | 1 | fahrenheit | °F
mol | 1 | amount | mole
mmol | 1/1000 | amount |
degree | 1 | angle | deg degrees
rad | 1 | radian | radian
dollar | 1 | dollar | USD usd bucks buck
cent | 1/100 | dollar | cents ¢
penny | 1/100 | dollar | pennies
nickel | 1/20 | dollar | nickels
dime | 1/10 | dollar | dimes
euro | 1 | euro | € eur EUR
£ | 1 | sterling | gbp pence_unit
¥ | 1 | yen | yen jpy
₹ | 1 | rupee | rupee rs inr
yuan | 1 | yuan | 元 rmb
bit | 1 | data | bits
byte | 8 | data | bytes
kb | 8000 | data | kilobyte
MB | 8000000 | data | megabyte mb
GB | 8000000000 | data | gigabyte gb
L | 1/1000 | length^3 | liter litre l
mL | 1/1000000 | length^3 | milliliter millilitre ml cc
gal | 473176473/125000000000 | length^3 | gallon gallons
qt | 473176473/500000000000 | length^3 | quart quarts
pt | 473176473/1000000000000 | length^3 | pint pints
cup | 473176473/2000000000000 | length^3 | cups
hectare | 10000 | length^2 | ha hectares
acre | 316160658/78125 | length^2 | acres
N | 1000 | mass length time^-2 | newton newtons
kN | 1000000 | mass length time^-2 |
J | 1000 | mass length^2 time^-2 | joule joules
kJ | 1000000 | mass length^2 time^-2 | kilojoule kilojoules
MJ | 1000000000 | mass length^2 time^-2 |
erg | 1/10000 | mass length^2 time^-2 | ergs
eV | 1/6241509074460762607776 | mass length^2 time^-2 | ev
keV | 1/6241509074460762607 | mass length^2 time^-2 | kev
MeV | 1/6241509074460762 | mass length^2 time^-2 | mev
W | 1000 | mass length^2 time^-3 | watt watts
kW | 1000000 | mass length^2 time^-3 | kilowatt kilowatts kw
MW | 1000000000 | mass length^2 time^-3 | megawatt
Wh | 3600000 | mass length^2 time^-2 |
kWh | 3600000000 | mass length^2 time^-2 | kwh kilowatthour
cal | 4184 | mass length^2 time^-2 | calorie calories
kcal | 4184000 | mass length^2 time^-2 | kilocalorie
mW | 1 | mass length^2 time^-3 | milliwatt
Pa | 1000 | mass length^-1 time^-2 | pascal pa
kPa | 1000000 | mass length^-1 time^-2 | kpa
atm | 101325000 | mass length^-1 time^-2 | atmosphere atmospheres
bar | 100000000 | mass length^-1 time^-2 |
Hz | 1 | time^-1 | hertz hz
kHz | 1000 | time^-1 | khz
MHz | 1000000 | time^-1 | mhz
GHz | 1000000000 | time^-1 | ghz
C | 1 | current time | coulomb coulombs
V | 1000 | mass length^2 time^-3 current^-1 | volt volts
mV | 1 | mass length^2 time^-3 current^-1 | millivolt
kV | 1000000 | mass length^2 time^-3 current^-1 |
Ω | 1000 | mass length^2 time^-3 current^-2 | ohm ohms
kΩ | 1000000 | mass length^2 time^-3 current^-2 |
F | 1/1000 | mass^-1 length^-2 time^4 current^2 | farad
T | 1000 | mass time^-2 current^-1 | tesla
H | 1000 | mass length^2 time^-2 current^-2 | henry
mph | 1397/3125 | length time^-1 |
kph | 5/18 | length time^-1 | kmh kmph
knot | 463/900 | length time^-1 | knots
rpm | 1/60 | time^-1 |
"""
_HAN_TABLE = """
米 m 厘米 cm 千米 km 公里 km 毫米 mm 克 g 千克 kg 公斤 kg 吨 t
秒 s 分钟 min 小时 h 天 day 升 L 毫升 mL 度 degree 元 yuan 平方米 m^2 平方厘米
cm^2 立方米 m^3 立方厘米 cm^3 平方千米 km^2
"""
# Words of one line mean the same direction; the lines that are "turned" are not what a bare number says.
_DIRECTION_TABLE = """
plain: profit gain gained earned
turned: loss lost losing
plain: increase increased rise rose growth higher
turned: decrease decreased drop dropped fall fell decline lower reduction
plain: north northward northwards
turned: south southward southwards
plain: east eastward eastwards
turned: west westward westwards
plain: northeast
plain: northwest
plain: southeast
plain: southwest
plain: ad ce
turned: bc bce
plain: clockwise
turned: counterclockwise anticlockwise
plain: above
turned: below
plain: more
turned: less fewer
plain: upward upwards up
turned: downward downwards down
plain: older
turned: younger
plain: deposit
turned: withdrawal
plain: surplus
turned: deficit
plain: ahead early
turned: behind late
plain: longer taller
plain: shorter
plain: faster
plain: slower
turned: before
plain: after
plain: discount off
plain: markup
plain: right
plain: leftward leftwards
plain: heavier
plain: lighter
plain: larger bigger
plain: smaller
plain: hotter warmer
plain: colder cooler
plain: deeper
plain: shallower
plain: cheaper
plain: dearer costlier
plain: credit
plain: debit
"""


def _units() -> dict[str, tuple[Dimensions, Fraction]]:
    table: dict[str, tuple[Dimensions, Fraction]] = {}
    for line in _TABLE.strip().splitlines():
        name, factor, dimensions, others = (part.strip() for part in (line + " ").split("|"))
        powers = [dimension.partition("^") for dimension in dimensions.split()]
        vector = tuple(sorted((dimension, int(power or 1)) for dimension, _, power in powers))
        for word in (name, *others.split()):
            table[word] = (vector, Fraction(factor))
    return table


UNITS = _units()
HAN = dict(zip(_HAN_TABLE.split()[::2], _HAN_TABLE.split()[1::2], strict=True))
POLARITIES = {
    word: words.split()[0]
    for line in _DIRECTION_TABLE.strip().splitlines()
    for _, _, words in (line.partition(": "),)
    for word in words.split()
}
TURNED = frozenset(line.split()[1] for line in _DIRECTION_TABLE.strip().splitlines() if line.startswith("turned"))
# Directions and eras: a gold that names one is not met by a bare number.
COMPASS = word_set("north south east west northeast northwest southeast southwest ad bc compass")
# One letter, bare behind a blank: "5 m" for 5 metres. Other letters are variables.
WEAK = word_set("m s g h J N W V K A C L F T H")
# Names that may follow a number without a blank; "ft" and "in" may be products.
GLUED = word_set(
    """GB GHz Hz MB MHz MeV Pa cents cm eV hr hrs kHz kJ kN kPa kW keV
    kg km mL mg min ml mm mol mph nm sec"""
)
CURRENCIES = {"\uff04": "dollar", "€": "euro", "£": "£", "¥": "¥", "₹": "rupee"}
COUNTS = {"dozen": 12, "dozens": 12, "pair": 2, "pairs": 2, "score": 20, "gross": 144}
# Words that make another statement of the number.
NO_UNIT = word_set("""
squared cubed factorial root roots power powers and or than not no none nor never except least most minimum
maximum plus minus times over under remainder mod modulo to from between out if infinity lambda half halves
third thirds quarter fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth
tenths hundredth hundredths thousandth thousandths millionth hundred thousand million billion trillion
quadrillion quintillion sextillion septillion lakh lakhs crore crores myriad googol point cdot circ
zero one two three four five six seven eight nine ten pi sqrt sin cos tan log ln exp digits digit
base is are was equals equal approximately about around roughly nearly almost but wrong incorrect false true
double twice triple doubled tripled halved inverse reciprocal negative positive divided multiplied million-th
choose permute for all where undefined
""")
# Words that say nothing of what was counted.
FILLER = word_set("""
of the a an in each every total altogether all per person left remaining away old tall long wide high deep unit
units square cubic that which were who will have has had his her their its extra apart this approx
""")
