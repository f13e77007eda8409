"""Facts of the offline world that no installed package holds, one row an entity; ``-`` stands for a fact that is left out.

Country: UN M49 subregion, demonym. Language: family, the country with most native speakers. US state: capital, largest city, census
division, nickname. Chemical element: atomic number, group. Author: country, best-known work, language of writing. Company: country,
headquarters, what it is known for, founder. Founders are given where there was one; numbers have two digits or more, since a
single digit is too easily part of a wrong answer.
"""

from __future__ import annotations

_COUNTRIES = """
AL|Southern Europe|Albanian
AT|Western Europe|Austrian
BY|Eastern Europe|Belarusian
BE|Western Europe|Belgian
HR|Southern Europe|Croatian
CZ|Eastern Europe|Czech
DK|Northern Europe|Danish
EE|Northern Europe|Estonian
FI|Northern Europe|Finnish
FR|Western Europe|French
DE|Western Europe|German
GR|Southern Europe|Greek
HU|Eastern Europe|Hungarian
IS|Northern Europe|Icelandic
IE|Northern Europe|Irish
IT|Southern Europe|Italian
LV|Northern Europe|Latvian
LT|Northern Europe|Lithuanian
MD|Eastern Europe|Moldovan
NL|Western Europe|Dutch
MK|Southern Europe|Macedonian
NO|Northern Europe|Norwegian
PL|Eastern Europe|Polish
PT|Southern Europe|Portuguese
RO|Eastern Europe|Romanian
RU|Eastern Europe|Russian
RS|Southern Europe|Serbian
SK|Eastern Europe|Slovak
SI|Southern Europe|Slovene
ES|Southern Europe|Spanish
SE|Northern Europe|Swedish
CH|Western Europe|Swiss
UA|Eastern Europe|Ukrainian
GB|Northern Europe|British
AF|Southern Asia|Afghan
AM|Western Asia|Armenian
AZ|Western Asia|Azerbaijani
BD|Southern Asia|Bangladeshi
KH|Southeast Asia|Cambodian
CN|Eastern Asia|Chinese
IN|Southern Asia|Indian
ID|Southeast Asia|Indonesian
IR|Southern Asia|Iranian
IQ|Western Asia|Iraqi
IL|Western Asia|Israeli
JP|Eastern Asia|Japanese
JO|Western Asia|Jordanian
KZ|Central Asia|Kazakh
KW|Western Asia|Kuwaiti
KG|Central Asia|Kyrgyz
LA|Southeast Asia|Laotian
LB|Western Asia|Lebanese
MY|Southeast Asia|Malaysian
MN|Eastern Asia|Mongolian
MM|Southeast Asia|Burmese
NP|Southern Asia|Nepalese
KP|Eastern Asia|-
OM|Western Asia|Omani
PK|Southern Asia|Pakistani
PH|Southeast Asia|Filipino
QA|Western Asia|Qatari
SA|Western Asia|Saudi
SG|Southeast Asia|Singaporean
KR|Eastern Asia|-
LK|Southern Asia|Sri Lankan
SY|Western Asia|Syrian
TH|Southeast Asia|-
TR|Western Asia|Turkish
AE|Western Asia|Emirati
UZ|Central Asia|Uzbek
VN|Southeast Asia|Vietnamese
YE|Western Asia|Yemeni
DZ|Northern Africa|Algerian
AO|Middle Africa|Angolan
BW|Southern Africa|Motswana
CM|Middle Africa|Cameroonian
CD|Middle Africa|Congolese
CI|Western Africa|Ivorian
EG|Northern Africa|Egyptian
ET|Eastern Africa|Ethiopian
GH|Western Africa|Ghanaian
KE|Eastern Africa|Kenyan
LY|Northern Africa|Libyan
MG|Eastern Africa|Malagasy
ML|Western Africa|Malian
MA|Northern Africa|Moroccan
MZ|Eastern Africa|Mozambican
NA|Southern Africa|Namibian
NG|Western Africa|Nigerian
RW|Eastern Africa|Rwandan
SN|Western Africa|Senegalese
SO|Eastern Africa|Somali
ZA|-|South African
SD|Northern Africa|Sudanese
TZ|Eastern Africa|Tanzanian
TN|Northern Africa|Tunisian
UG|Eastern Africa|Ugandan
ZM|Eastern Africa|Zambian
CA|Northern America|Canadian
CR|Central America|Costa Rican
CU|Caribbean|Cuban
DO|Caribbean|-
SV|Central America|Salvadoran
GT|Central America|Guatemalan
HT|Caribbean|Haitian
HN|Central America|Honduran
JM|Caribbean|Jamaican
MX|Central America|Mexican
NI|Central America|Nicaraguan
PA|Central America|Panamanian
US|Northern America|American
AR|South America|Argentine
BO|South America|Bolivian
BR|South America|Brazilian
CL|South America|Chilean
CO|South America|Colombian
EC|South America|Ecuadorian
PE|South America|Peruvian
PY|South America|Paraguayan
UY|South America|Uruguayan
VE|South America|Venezuelan
AU|Australasia|Australian
NZ|Australasia|New Zealander
"""

_LANGUAGES = """
en|Germanic|US
fr|Romance|FR
de|Germanic|DE
es|Romance|MX
pt|Romance|BR
it|Romance|IT
nl|Germanic|NL
sv|Germanic|SE
da|Germanic|DK
no|Germanic|NO
fi|Uralic|FI
is|Germanic|IS
et|Uralic|EE
lv|Baltic|LV
lt|Baltic|LT
pl|Slavic|PL
cs|Slavic|CZ
sk|Slavic|SK
hu|Uralic|HU
ro|Romance|RO
bg|Slavic|-
ru|Slavic|RU
uk|Slavic|UA
be|Slavic|BY
sr|Slavic|RS
hr|Slavic|HR
sl|Slavic|SI
mk|Slavic|MK
sq|-|AL
el|-|GR
tr|Turkic|TR
az|Turkic|IR
ka|Kartvelian|-
hy|-|AM
he|Semitic|IL
ar|Semitic|EG
fa|Iranian|IR
ur|Indo-Aryan|PK
hi|Indo-Aryan|IN
bn|Indo-Aryan|BD
ta|Dravidian|IN
te|Dravidian|IN
gu|Indo-Aryan|IN
pa|Indo-Aryan|PK
mr|Indo-Aryan|IN
ne|Indo-Aryan|NP
si|Indo-Aryan|LK
th|Tai|TH
vi|Austroasiatic|VN
km|Austroasiatic|KH
lo|Tai|TH
my|Sino-Tibetan|MM
zh|Sino-Tibetan|CN
ja|Japonic|JP
ko|Koreanic|KR
mn|Mongolic|CN
kk|Turkic|KZ
ky|Turkic|KG
uz|Turkic|UZ
tg|Iranian|-
tk|Turkic|-
ms|Austronesian|MY
id|Austronesian|ID
sw|Bantu|TZ
am|Semitic|ET
so|Cushitic|SO
ha|Chadic|NG
yo|Volta-Niger|NG
ig|Volta-Niger|NG
zu|Bantu|ZA
xh|Bantu|ZA
af|Germanic|ZA
mg|Austronesian|MG
ga|Celtic|IE
cy|Celtic|GB
eu|-|ES
ca|Romance|ES
"""

_STATES = """
Alabama|Montgomery|Huntsville|East South Central|the Yellowhammer State
Alaska|Juneau|Anchorage|Pacific|the Last Frontier
Arizona|Phoenix|Phoenix|Mountain|the Grand Canyon State
Arkansas|Little Rock|Little Rock|West South Central|the Natural State
California|Sacramento|Los Angeles|Pacific|the Golden State
Colorado|Denver|Denver|Mountain|the Centennial State
Connecticut|Hartford|Bridgeport|New England|the Constitution State
Delaware|Dover|Wilmington|South Atlantic|the First State
Florida|Tallahassee|Jacksonville|South Atlantic|the Sunshine State
Georgia|Atlanta|Atlanta|South Atlantic|the Peach State
Hawaii|Honolulu|Honolulu|Pacific|the Aloha State
Idaho|Boise|Boise|Mountain|the Gem State
Illinois|Springfield|Chicago|East North Central|the Prairie State
Indiana|Indianapolis|Indianapolis|East North Central|the Hoosier State
Iowa|Des Moines|Des Moines|West North Central|the Hawkeye State
Kansas|Topeka|Wichita|West North Central|the Sunflower State
Kentucky|Frankfort|Louisville|East South Central|the Bluegrass State
Louisiana|Baton Rouge|New Orleans|West South Central|the Pelican State
Maine|Augusta|Portland|New England|the Pine Tree State
Maryland|Annapolis|Baltimore|South Atlantic|the Old Line State
Massachusetts|Boston|Boston|New England|the Bay State
Michigan|Lansing|Detroit|East North Central|the Wolverine State
Minnesota|Saint Paul|Minneapolis|West North Central|the North Star State
Mississippi|Jackson|Jackson|East South Central|the Magnolia State
Missouri|Jefferson City|Kansas City|West North Central|the Show-Me State
Montana|Helena|Billings|Mountain|the Treasure State
Nebraska|Lincoln|Omaha|West North Central|the Cornhusker State
Nevada|Carson City|Las Vegas|Mountain|the Silver State
New Hampshire|Concord|Manchester|New England|the Granite State
New Jersey|Trenton|Newark|Middle Atlantic|the Garden State
New Mexico|Santa Fe|Albuquerque|Mountain|the Land of Enchantment
New York|Albany|-|Middle Atlantic|the Empire State
North Carolina|Raleigh|Charlotte|South Atlantic|the Tar Heel State
North Dakota|Bismarck|Fargo|West North Central|the Peace Garden State
Ohio|Columbus|Columbus|East North Central|the Buckeye State
Oklahoma|Oklahoma City|Oklahoma City|West South Central|the Sooner State
Oregon|Salem|Portland|Pacific|the Beaver State
Pennsylvania|Harrisburg|Philadelphia|Middle Atlantic|the Keystone State
Rhode Island|Providence|Providence|New England|the Ocean State
South Carolina|Columbia|Charleston|South Atlantic|the Palmetto State
South Dakota|Pierre|Sioux Falls|West North Central|the Mount Rushmore State
Tennessee|Nashville|Nashville|East South Central|the Volunteer State
Texas|Austin|Houston|West South Central|the Lone Star State
Utah|Salt Lake City|Salt Lake City|Mountain|the Beehive State
Vermont|Montpelier|Burlington|New England|the Green Mountain State
Virginia|Richmond|Virginia Beach|South Atlantic|the Old Dominion
Washington|Olympia|Seattle|Pacific|the Evergreen State
West Virginia|Charleston|Charleston|South Atlantic|the Mountain State
Wisconsin|Madison|Milwaukee|East North Central|the Badger State
Wyoming|Cheyenne|Cheyenne|Mountain|the Equality State
"""

_ELEMENTS = """
neon|10|noble gas
sodium|11|alkali metal
magnesium|12|alkaline earth metal
aluminium|13|-
silicon|14|metalloid
phosphorus|15|-
sulfur|16|-
chlorine|17|halogen
argon|18|noble gas
potassium|19|alkali metal
calcium|20|alkaline earth metal
titanium|22|transition metal
vanadium|23|transition metal
chromium|24|transition metal
manganese|25|transition metal
iron|26|transition metal
cobalt|27|transition metal
nickel|28|transition metal
copper|29|transition metal
zinc|30|-
gallium|31|-
germanium|32|metalloid
arsenic|33|metalloid
bromine|35|halogen
krypton|36|noble gas
rubidium|37|alkali metal
strontium|38|alkaline earth metal
zirconium|40|transition metal
silver|47|transition metal
tin|50|-
antimony|51|metalloid
tellurium|52|metalloid
iodine|53|halogen
xenon|54|noble gas
caesium|55|alkali metal
barium|56|alkaline earth metal
lanthanum|57|lanthanide
cerium|58|lanthanide
neodymium|60|lanthanide
europium|63|lanthanide
tungsten|74|transition metal
platinum|78|transition metal
gold|79|transition metal
mercury|80|-
lead|82|-
bismuth|83|-
radon|86|noble gas
radium|88|alkaline earth metal
thorium|90|actinide
uranium|92|actinide
plutonium|94|actinide
"""

_AUTHORS = """
Leo Tolstoy|RU|War and Peace|ru
Fyodor Dostoevsky|RU|Crime and Punishment|ru
Anton Chekhov|RU|The Cherry Orchard|ru
Victor Hugo|FR|Les Misérables|fr
Albert Camus|FR|The Stranger|fr
Gustave Flaubert|FR|Madame Bovary|fr
Marcel Proust|FR|In Search of Lost Time|fr
Jules Verne|FR|Around the World in Eighty Days|fr
Johann Wolfgang von Goethe|DE|Faust|de
Thomas Mann|DE|The Magic Mountain|de
Günter Grass|DE|The Tin Drum|de
Dante Alighieri|IT|The Divine Comedy|it
Umberto Eco|IT|The Name of the Rose|it
Miguel de Cervantes|ES|Don Quixote|es
Gabriel García Márquez|CO|One Hundred Years of Solitude|es
Pablo Neruda|CL|Canto General|es
Isabel Allende|CL|The House of the Spirits|es
Mario Vargas Llosa|PE|The Time of the Hero|es
Jorge Luis Borges|AR|Ficciones|es
Octavio Paz|MX|The Labyrinth of Solitude|es
Paulo Coelho|BR|The Alchemist|pt
José Saramago|PT|Blindness|pt
Henrik Ibsen|NO|A Doll's House|no
Knut Hamsun|NO|Hunger|no
Hans Christian Andersen|DK|The Little Mermaid|da
Astrid Lindgren|SE|Pippi Longstocking|sv
August Strindberg|SE|Miss Julie|sv
Mika Waltari|FI|The Egyptian|fi
Halldór Laxness|IS|Independent People|is
Milan Kundera|CZ|The Unbearable Lightness of Being|cs
Jaroslav Hašek|CZ|The Good Soldier Švejk|cs
Henryk Sienkiewicz|PL|Quo Vadis|pl
Olga Tokarczuk|PL|Flights|pl
Stanisław Lem|PL|Solaris|pl
Imre Kertész|HU|Fatelessness|hu
Ismail Kadare|AL|The General of the Dead Army|sq
Nikos Kazantzakis|GR|Zorba the Greek|el
Orhan Pamuk|TR|My Name Is Red|tr
Naguib Mahfouz|EG|Palace Walk|ar
Chinua Achebe|NG|Things Fall Apart|en
J. M. Coetzee|ZA|Disgrace|en
Haruki Murakami|JP|Norwegian Wood|ja
Yukio Mishima|JP|Confessions of a Mask|ja
Lu Xun|CN|The True Story of Ah Q|zh
Mo Yan|CN|Red Sorghum|zh
Han Kang|KR|The Vegetarian|ko
Rabindranath Tagore|IN|Gitanjali|bn
Mark Twain|US|The Adventures of Tom Sawyer|en
Ernest Hemingway|US|The Old Man and the Sea|en
Harper Lee|US|To Kill a Mockingbird|en
Margaret Atwood|CA|The Handmaid's Tale|en
Charles Dickens|GB|Oliver Twist|en
Jane Austen|GB|Pride and Prejudice|en
James Joyce|IE|Ulysses|en
Katherine Mansfield|NZ|The Garden Party|en
Harry Mulisch|NL|The Assault|nl
Taras Shevchenko|UA|Kobzar|uk
"""

_COMPANIES = """
Honda|JP|Tokyo|cars|Soichiro Honda
Nintendo|JP|Kyoto|video games|Fusajiro Yamauchi
Sony|JP|Tokyo|electronics|-
Toyota|JP|-|cars|Kiichiro Toyoda
Canon|JP|Tokyo|cameras|-
Samsung|KR|Seoul|electronics|Lee Byung-chul
Hyundai|KR|Seoul|cars|Chung Ju-yung
Volkswagen|DE|Wolfsburg|cars|-
BMW|DE|Munich|cars|-
Siemens|DE|Munich|engineering|Werner von Siemens
Bayer|DE|Leverkusen|medicines|Friedrich Bayer
Adidas|DE|Herzogenaurach|sports shoes|Adolf Dassler
Puma|DE|Herzogenaurach|sports shoes|Rudolf Dassler
Lufthansa|DE|Cologne|flights|-
Ferrari|IT|Maranello|cars|Enzo Ferrari
Fiat|IT|Turin|cars|Giovanni Agnelli
Pirelli|IT|Milan|tyres|Giovanni Battista Pirelli
Prada|IT|Milan|fashion|Mario Prada
Gucci|IT|Florence|fashion|Guccio Gucci
Barilla|IT|Parma|pasta|Pietro Barilla
Renault|FR|-|cars|Louis Renault
Michelin|FR|Clermont-Ferrand|tyres|-
Danone|FR|Paris|yoghurt|Isaac Carasso
L'Oréal|FR|Clichy|cosmetics|Eugène Schueller
Nestlé|CH|Vevey|food|Henri Nestlé
Rolex|CH|Geneva|watches|Hans Wilsdorf
Swatch|CH|Biel|watches|Nicolas Hayek
Novartis|CH|Basel|medicines|-
Philips|NL|Amsterdam|electronics|-
Heineken|NL|Amsterdam|beer|Gerard Adriaan Heineken
KLM|NL|Amstelveen|flights|Albert Plesman
IKEA|SE|-|furniture|Ingvar Kamprad
Volvo|SE|Gothenburg|cars|-
Ericsson|SE|Stockholm|telephone equipment|Lars Magnus Ericsson
Spotify|SE|Stockholm|music streaming|-
Nokia|FI|Espoo|telephone equipment|Fredrik Idestam
Lego|DK|Billund|toys|Ole Kirk Christiansen
Carlsberg|DK|Copenhagen|beer|J. C. Jacobsen
Maersk|DK|Copenhagen|shipping|-
Swarovski|AT|Wattens|crystal glass|Daniel Swarovski
Škoda|CZ|Mladá Boleslav|cars|-
Zara|ES|Arteixo|fashion|Amancio Ortega
Guinness|IE|Dublin|beer|Arthur Guinness
Ryanair|IE|-|flights|Tony Ryan
Tesco|GB|Welwyn Garden City|supermarkets|Jack Cohen
Burberry|GB|London|fashion|Thomas Burberry
Boeing|US|Arlington|aircraft|William Boeing
Ford|US|Dearborn|cars|Henry Ford
Nike|US|Beaverton|sports shoes|-
Microsoft|US|Redmond|software|-
Amazon|US|Seattle|online shopping|Jeff Bezos
Starbucks|US|Seattle|coffee|-
Disney|US|Burbank|films|Walt Disney
Coca-Cola|US|Atlanta|soft drinks|-
Infosys|IN|Bengaluru|software|-
Tata|IN|Mumbai|steel|Jamsetji Tata
Huawei|CN|Shenzhen|telephone equipment|Ren Zhengfei
Alibaba|CN|Hangzhou|online shopping|Jack Ma
Lenovo|CN|Beijing|computers|Liu Chuanzhi
Petrobras|BR|Rio de Janeiro|oil|-
Embraer|BR|São José dos Campos|aircraft|-
Gazprom|RU|Saint Petersburg|natural gas|-
Aeroflot|RU|Moscow|flights|-
Aramco|SA|Dhahran|oil|-
Emirates|AE|Dubai|flights|-
Qantas|AU|Sydney|flights|-
Cemex|MX|Monterrey|cement|-
Bombardier|CA|Montreal|aircraft|Joseph-Armand Bombardier
Dangote|NG|Lagos|cement|Aliko Dangote
"""


def _read(rows: str, *relations: str) -> dict[str, dict[str, str]]:
    """``{first field: {relation: value}}``, without the facts that are left out."""
    table = {}
    for line in rows.strip().split("\n"):
        key, *values = line.split("|")
        table[key] = {relation: value for relation, value in zip(relations, values, strict=True) if value != "-"}
    return table


# Keyed by ISO 3166 and 639-1 codes.
COUNTRIES = _read(_COUNTRIES, "subregion", "demonym")
LANGUAGES = _read(_LANGUAGES, "family", "homeland")
# Keyed by name. Countries and languages are codes in all tables.
STATES = _read(_STATES, "capital", "largest_city", "division", "nickname")
ELEMENTS = _read(_ELEMENTS, "atomic_number", "group")
AUTHORS = _read(_AUTHORS, "country", "work", "language")
COMPANIES = _read(_COMPANIES, "country", "headquarters", "product", "founder")
