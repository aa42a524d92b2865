"""The hand-written half of `build_geo.py`: lists of common knowledge, names in English, wordings.

Everything here was written for this project. Nothing was copied from a data set.
"""

from __future__ import annotations

#: ISO codes of the member states of the United Nations. Other territories are left out: which
#: country they belong to is disputed, or they are seldom called a country.
MEMBERS = frozenset(
    (
        "AF AL DZ AD AO AG AR AM AU AT AZ BS BH BD BB BY BE BZ BJ BT BO BA BW BR BN BG BF BI CV KH "
        "CM CA CF TD CL CN CO KM CG CD CR CI HR CU CY CZ DK DJ DM DO EC EG SV GQ ER EE SZ ET FJ FI "
        "FR GA GM GE DE GH GR GD GT GN GW GY HT HN HU IS IN ID IR IQ IE IL IT JM JP JO KZ KE KI KP "
        "KR KW KG LA LV LB LS LR LY LI LT LU MG MW MY MV ML MT MH MR MU MX FM MD MC MN ME MA MZ MM "
        "NA NR NP NL NZ NI NE NG MK NO OM PK PW PA PG PY PE PH PL PT QA RO RU RW KN LC VC WS SM ST "
        "SA SN RS SC SL SG SK SI SB SO ZA SS ES LK SD SR SE CH SY TJ TZ TH TL TG TO TT TN TR TM TV "
        "UG UA AE GB US UY UZ VU VE VN YE ZM ZW"
    ).split()
)

#: Places whose country or status is disputed: no fact is about them.
DISPUTED = frozenset(
    "Jerusalem, East Jerusalem, Ramallah, Gaza, Donetsk, Luhansk, Mariupol, Simferopol, Sevastopol, "
    "Srinagar, Muzaffarabad, Laayoune, Taipei, Hong Kong".split(", ")
)

#: Entries of GeoNames that are parts of cities or no cities.
NOT_CITIES = frozenset(
    "Brooklyn, Queens, Manhattan, The Bronx, South Boston, West Raleigh, New South Memphis, "
    "Lexington-Fayette, Meads, Tri-Cities, North Las Vegas, Pest, Buda, South Dublin, Khartoum North, "
    "Bandundu Province, Dorval, Roodepoort, Randburg, Quezon City, Caloocan, Mandaluyong City".split(
        ", "
    )
)

#: ISO code -> (English name, in running text, other names). By default GeoNames's name, no article.
COUNTRIES = {
    "AE": (
        "United Arab Emirates",
        "the United Arab Emirates",
        ["UAE", "U.A.E.", "Emirates"],
    ),
    "BA": ("Bosnia and Herzegovina", "Bosnia and Herzegovina", ["Bosnia", "Bosnia-Herzegovina"]),
    "BS": ("Bahamas", "the Bahamas", []),
    "CD": (
        "Democratic Republic of the Congo",
        "the Democratic Republic of the Congo",
        ["Democratic Republic of Congo", "DR Congo", "DRC", "Congo", "Zaire"],
    ),
    "CF": ("Central African Republic", "the Central African Republic", ["CAR"]),
    "CG": (
        "Republic of the Congo",
        "the Republic of the Congo",
        ["Congo", "Republic of Congo", "Congo-Brazzaville"],
    ),
    "CI": ("Ivory Coast", "Ivory Coast", ["Côte d'Ivoire"]),
    "CN": ("China", "China", ["People's Republic of China", "PRC"]),
    "CV": ("Cape Verde", "Cape Verde", ["Cabo Verde"]),
    "CZ": ("Czech Republic", "the Czech Republic", ["Czechia"]),
    "DO": ("Dominican Republic", "the Dominican Republic", []),
    "GB": (
        "United Kingdom",
        "the United Kingdom",
        ["UK", "U.K.", "Great Britain", "Britain"],
    ),
    "GE": ("Georgia", "the country of Georgia", []),
    "GM": ("Gambia", "the Gambia", []),
    "IR": ("Iran", "Iran", ["Islamic Republic of Iran"]),
    "KM": ("Comoros", "the Comoros", []),
    "KP": ("North Korea", "North Korea", ["DPRK"]),
    "KR": ("South Korea", "South Korea", ["Korea", "Republic of Korea"]),
    "MK": ("North Macedonia", "North Macedonia", ["Macedonia"]),
    "MM": ("Myanmar", "Myanmar", ["Burma"]),
    "MV": ("Maldives", "the Maldives", []),
    "NL": ("Netherlands", "the Netherlands", ["Holland"]),
    "PH": ("Philippines", "the Philippines", []),
    "RU": ("Russia", "Russia", ["Russian Federation"]),
    "SB": ("Solomon Islands", "the Solomon Islands", []),
    "SZ": ("Eswatini", "Eswatini", ["Swaziland"]),
    "TL": ("East Timor", "East Timor", ["Timor-Leste"]),
    "TR": ("Turkey", "Turkey", ["Türkiye"]),
    "US": (
        "United States",
        "the United States",
        ["USA", "U.S.A.", "US", "U.S.", "United States of America", "America"],
    ),
}

#: Capitals as they are called in English, and further cities that may be named as the capital.
CAPITALS = {
    "BO": ["Sucre", "La Paz"],
    "BR": ["Brasilia"],
    "CL": ["Santiago"],
    "GQ": ["Malabo", "Ciudad de la Paz"],
    "ID": ["Jakarta", "Nusantara"],
    "KZ": ["Astana", "Nur-Sultan"],
    "LK": ["Colombo", "Sri Jayawardenepura Kotte"],
    "MM": ["Naypyidaw", "Nay Pyi Taw", "Naypyitaw"],
    "MN": ["Ulaanbaatar", "Ulan Bator"],
    "SZ": ["Mbabane", "Lobamba"],
    "UA": ["Kyiv", "Kiev"],
    "US": ["Washington, D.C.", "Washington", "Washington DC", "Washington D.C."],
    "YE": ["Sanaa", "Sana'a", "Aden"],
    "ZA": ["Pretoria", "Cape Town", "Bloemfontein"],
}
#: Capitals that are named by more than one country's question or are disputed: not asked for.
NO_CAPITAL = frozenset({"IL"})

#: Countries on two continents; both are accepted.
CONTINENTS = {
    "AM": ["Asia", "Europe"],
    "AZ": ["Asia", "Europe"],
    "CY": ["Europe", "Asia"],
    "EG": ["Africa", "Asia"],
    "GE": ["Asia", "Europe"],
    "ID": ["Asia", "Oceania"],
    "KZ": ["Asia", "Europe"],
    "PA": ["North America", "South America"],
    "RU": ["Europe", "Asia"],
    "TL": ["Asia", "Oceania"],
    "TR": ["Asia", "Europe"],
    "TT": ["North America", "South America"],
}

#: Countries whose first official language is another than GeoNames's first, or that have others.
LANGUAGES = {"IN": ["hi", "en"], "MG": ["mg", "fr"], "UA": ["uk"]}
#: Further official languages that the sources do not name.
LANGUAGES_TOO = {
    "DZ": ["Berber", "Tamazight"],
    "MA": ["Berber", "Tamazight"],
    "ME": ["Montenegrin"],
}
LANGUAGE_ALIASES = {
    "Azerbaijani": ["Azeri"],
    "Bangla": ["Bengali"],
    "Haitian Creole": ["Creole", "Kreyòl"],
    "Nyanja": ["Chichewa", "Chewa"],
    "Rundi": ["Kirundi"],
    "Sinhala": ["Sinhalese"],
    "Southern Sotho": ["Sesotho", "Sotho"],
    "Swati": ["siSwati", "Swazi"],
    "Tswana": ["Setswana"],
    "Chinese": ["Mandarin", "Mandarin Chinese", "Standard Chinese"],
    "Persian": ["Farsi", "Dari"],
    "Filipino": ["Tagalog"],
    "Khmer": ["Cambodian"],
    "Burmese": ["Myanmar language"],
    "Malay": ["Bahasa Melayu", "Bahasa Malaysia", "Malaysian"],
    "Indonesian": ["Bahasa Indonesia", "Bahasa"],
    "Swahili": ["Kiswahili"],
    "Spanish": ["Castilian"],
    "Norwegian": ["Bokmål", "Norwegian Bokmål"],
    "Hebrew": ["Modern Hebrew"],
    "Divehi": ["Dhivehi", "Maldivian"],
}

#: Currencies that two laws or a recent change make plural: further accepted answers.
CURRENCIES = {
    "BG": ["euro"],
    "CN": ["renminbi", "yuan renminbi"],
    "GB": ["pound sterling", "sterling"],
    "IL": ["new shekel"],
    "BA": ["convertible mark"],
    "US": ["U.S. dollar", "United States dollar", "American dollar"],
}
NO_CURRENCY = frozenset({"ZW"})
#: Kinds of one name in several spellings.
CURRENCY_SPELLINGS = {
    "riyal": ["rial"],
    "rial": ["riyal"],
    "ruble": ["rouble"],
    "bolívar": ["bolivar", "bolivar soberano"],
    "som": ["sum", "soum"],
    "tugrik": ["tögrög", "tugrug"],
}

#: ISO code -> demonyms, the first one being the answer.
DEMONYMS = {
    code: names.split(", ")
    for code, names in {
        "AE": "Emirati",
        "AF": "Afghan, Afghani",
        "AL": "Albanian",
        "AM": "Armenian",
        "AO": "Angolan",
        "AR": "Argentine, Argentinian, Argentinean",
        "AT": "Austrian",
        "AU": "Australian, Aussie",
        "AZ": "Azerbaijani, Azeri",
        "BA": "Bosnian, Bosnian and Herzegovinian, Herzegovinian",
        "BB": "Barbadian, Bajan",
        "BD": "Bangladeshi",
        "BE": "Belgian",
        "BF": "Burkinabe, Burkinabé",
        "BG": "Bulgarian",
        "BH": "Bahraini",
        "BI": "Burundian",
        "BJ": "Beninese",
        "BN": "Bruneian",
        "BO": "Bolivian",
        "BR": "Brazilian",
        "BS": "Bahamian",
        "BT": "Bhutanese",
        "BW": "Motswana, Batswana, Botswanan",
        "BY": "Belarusian",
        "BZ": "Belizean",
        "CA": "Canadian",
        "CD": "Congolese",
        "CF": "Central African",
        "CG": "Congolese",
        "CH": "Swiss",
        "CI": "Ivorian",
        "CL": "Chilean",
        "CM": "Cameroonian",
        "CN": "Chinese",
        "CO": "Colombian",
        "CR": "Costa Rican",
        "CU": "Cuban",
        "CV": "Cape Verdean, Cabo Verdean",
        "CY": "Cypriot",
        "CZ": "Czech",
        "DE": "German",
        "DJ": "Djiboutian",
        "DK": "Danish, Dane",
        "DO": "Dominican",
        "DZ": "Algerian",
        "EC": "Ecuadorian, Ecuadorean",
        "EE": "Estonian",
        "EG": "Egyptian",
        "ER": "Eritrean",
        "ES": "Spanish, Spaniard",
        "ET": "Ethiopian",
        "FI": "Finnish, Finn",
        "FJ": "Fijian",
        "FR": "French, Frenchman, Frenchmen",
        "GA": "Gabonese",
        "GB": "British, Briton, Brit",
        "GE": "Georgian",
        "GH": "Ghanaian",
        "GM": "Gambian",
        "GN": "Guinean",
        "GR": "Greek",
        "GT": "Guatemalan",
        "GW": "Bissau-Guinean",
        "GY": "Guyanese",
        "HN": "Honduran",
        "HR": "Croatian, Croat",
        "HT": "Haitian",
        "HU": "Hungarian",
        "ID": "Indonesian",
        "IE": "Irish, Irishman, Irishmen",
        "IL": "Israeli",
        "IN": "Indian",
        "IQ": "Iraqi",
        "IR": "Iranian, Persian",
        "IS": "Icelandic, Icelander",
        "IT": "Italian",
        "JM": "Jamaican",
        "JO": "Jordanian",
        "JP": "Japanese",
        "KE": "Kenyan",
        "KG": "Kyrgyz, Kyrgyzstani",
        "KH": "Cambodian, Khmer",
        "KM": "Comorian",
        "KP": "North Korean, Korean",
        "KR": "South Korean, Korean",
        "KW": "Kuwaiti",
        "KZ": "Kazakh, Kazakhstani",
        "LA": "Laotian, Lao",
        "LB": "Lebanese",
        "LK": "Sri Lankan",
        "LR": "Liberian",
        "LS": "Mosotho, Basotho",
        "LT": "Lithuanian",
        "LU": "Luxembourgish, Luxembourger",
        "LV": "Latvian",
        "LY": "Libyan",
        "MA": "Moroccan",
        "MD": "Moldovan",
        "ME": "Montenegrin",
        "MG": "Malagasy, Madagascan",
        "MK": "Macedonian, North Macedonian",
        "ML": "Malian",
        "MM": "Burmese",
        "MN": "Mongolian, Mongol",
        "MR": "Mauritanian",
        "MT": "Maltese",
        "MU": "Mauritian",
        "MV": "Maldivian",
        "MW": "Malawian",
        "MX": "Mexican",
        "MY": "Malaysian",
        "MZ": "Mozambican",
        "NA": "Namibian",
        "NE": "Nigerien",
        "NG": "Nigerian",
        "NI": "Nicaraguan",
        "NL": "Dutch, Dutchman, Dutchmen, Netherlander",
        "NO": "Norwegian",
        "NP": "Nepali, Nepalese",
        "NZ": "New Zealander, Kiwi",
        "OM": "Omani",
        "PA": "Panamanian",
        "PE": "Peruvian",
        "PG": "Papua New Guinean",
        "PH": "Filipino, Filipina, Philippine",
        "PK": "Pakistani",
        "PL": "Polish, Pole",
        "PT": "Portuguese",
        "PY": "Paraguayan",
        "QA": "Qatari",
        "RO": "Romanian",
        "RS": "Serbian, Serb",
        "RU": "Russian",
        "RW": "Rwandan",
        "SA": "Saudi, Saudi Arabian",
        "SB": "Solomon Islander",
        "SD": "Sudanese",
        "SE": "Swedish, Swede",
        "SI": "Slovenian, Slovene",
        "SK": "Slovak, Slovakian",
        "SL": "Sierra Leonean",
        "SN": "Senegalese",
        "SO": "Somali",
        "SR": "Surinamese",
        "SS": "South Sudanese",
        "SV": "Salvadoran, Salvadorian",
        "SY": "Syrian",
        "SZ": "Swazi",
        "TD": "Chadian",
        "TG": "Togolese",
        "TH": "Thai",
        "TJ": "Tajik, Tajikistani",
        "TL": "Timorese, East Timorese",
        "TM": "Turkmen",
        "TN": "Tunisian",
        "TR": "Turkish, Turk",
        "TT": "Trinidadian, Trinidadian and Tobagonian",
        "TZ": "Tanzanian",
        "UA": "Ukrainian",
        "UG": "Ugandan",
        "US": "American",
        "UY": "Uruguayan",
        "UZ": "Uzbek, Uzbekistani",
        "VE": "Venezuelan",
        "VN": "Vietnamese",
        "YE": "Yemeni",
        "ZA": "South African",
        "ZM": "Zambian",
        "ZW": "Zimbabwean",
    }.items()
}

#: GeoNames's name of a city -> (the name in English, other names).
CITIES = {
    "Ahvaz": ("Ahvaz", ["Ahwaz"]),
    "Al Ain City": ("Al Ain", []),
    "Al Fayyum": ("Faiyum", []),
    "Ar Raqqah": ("Raqqa", []),
    "Andijon": ("Andijan", []),
    "Basrah": ("Basra", []),
    "Cheongju-si": ("Cheongju", []),
    "Dihok": ("Duhok", []),
    "Fes": ("Fez", ["Fes", "Fès"]),
    "Gent": ("Ghent", ["Gent"]),
    "Hargeysa": ("Hargeisa", []),
    "Hamah": ("Hama", []),
    "Jeju City": ("Jeju", []),
    "Kryvyy Rih": ("Kryvyi Rih", []),
    "Mahilyow": ("Mogilev", ["Mahilyow"]),
    "Nay Pyi Taw": ("Naypyidaw", ["Nay Pyi Taw"]),
    "Nizhniy Novgorod": ("Nizhny Novgorod", []),
    "Santiago de Querétaro": ("Queretaro", []),
    "Xi’an": ("Xi'an", ["Xian"]),
    "Zaporizhzhya": ("Zaporizhzhia", []),
    "Bengaluru": ("Bangalore", ["Bengaluru"]),
    "Brugge": ("Bruges", ["Brugge"]),
    "Chattogram": ("Chittagong", ["Chattogram"]),
    "Homyel'": ("Gomel", ["Homyel"]),
    "Hrodna": ("Grodno", ["Hrodna"]),
    "Frankfurt am Main": ("Frankfurt", ["Frankfurt am Main"]),
    "Gqeberha": ("Port Elizabeth", ["Gqeberha"]),
    "Hannover": ("Hanover", ["Hannover"]),
    "Kandahār": ("Kandahar", []),
    "Kolkata": ("Kolkata", ["Calcutta"]),
    "Kyiv": ("Kyiv", ["Kiev"]),
    "Köln": ("Cologne", ["Köln"]),
    "Madinah": ("Medina", []),
    "Makkah": ("Mecca", []),
    "Mumbai": ("Mumbai", ["Bombay"]),
    "Newcastle upon Tyne": ("Newcastle upon Tyne", ["Newcastle"]),
    "Odesa": ("Odessa", ["Odesa"]),
    "New York City": ("New York City", ["New York", "NYC"]),
    "Québec": ("Quebec City", ["Quebec"]),
    "Saint Petersburg": ("Saint Petersburg", ["St. Petersburg", "St Petersburg"]),
    "Sevilla": ("Seville", []),
    "Siracusa": ("Syracuse", []),
    "Tel Aviv": ("Tel Aviv", ["Tel Aviv-Yafo"]),
    "Ulan Bator": ("Ulaanbaatar", ["Ulan Bator"]),
    "Washington": ("Washington", ["Washington, D.C.", "Washington D.C.", "Washington DC"]),
    "Zaragoza": ("Zaragoza", ["Saragossa"]),
    "Yangon": ("Yangon", ["Rangoon"]),
    "Ho Chi Minh City": ("Ho Chi Minh City", ["Saigon"]),
    "Guangzhou": ("Guangzhou", ["Canton"]),
    "Beijing": ("Beijing", ["Peking"]),
}

#: Well-known landmarks: (in running text, city or "", ISO code of the country).
LANDMARKS = [
    (text.strip(), city.strip(), code.strip())
    for text, city, code in (
        line.split("|")
        for line in """\
the Eiffel Tower|Paris|FR
the Louvre|Paris|FR
the Arc de Triomphe|Paris|FR
the Sacré-Cœur|Paris|FR
the Moulin Rouge|Paris|FR
the Musée d'Orsay|Paris|FR
the Palace of Versailles||FR
Mont-Saint-Michel||FR
the Pont du Gard||FR
the Colosseum|Rome|IT
the Trevi Fountain|Rome|IT
the Pantheon|Rome|IT
the Spanish Steps|Rome|IT
the Uffizi Gallery|Florence|IT
the Ponte Vecchio|Florence|IT
the Leaning Tower of Pisa||IT
the Rialto Bridge||IT
La Scala|Milan|IT
Mount Vesuvius||IT
Mount Etna||IT
Pompeii||IT
Lake Como||IT
Big Ben|London|GB
Buckingham Palace|London|GB
the Tower Bridge|London|GB
Westminster Abbey|London|GB
Trafalgar Square|London|GB
Wembley Stadium|London|GB
Hyde Park|London|GB
the Shard|London|GB
Stonehenge||GB
Loch Ness||GB
Hadrian's Wall||GB
Ben Nevis||GB
Windsor Castle||GB
Old Trafford|Manchester|GB
Anfield|Liverpool|GB
the Sagrada Família|Barcelona|ES
Park Güell|Barcelona|ES
the Camp Nou|Barcelona|ES
Las Ramblas|Barcelona|ES
the Prado Museum|Madrid|ES
the Puerta del Sol|Madrid|ES
the Alhambra||ES
Ibiza||ES
Mount Teide||ES
the Brandenburg Gate|Berlin|DE
Checkpoint Charlie|Berlin|DE
the Reichstag|Berlin|DE
Neuschwanstein Castle||DE
the Elbphilharmonie|Hamburg|DE
the Zwinger Palace|Dresden|DE
the Marienplatz|Munich|DE
the Black Forest||DE
the Zugspitze||DE
the Schönbrunn Palace|Vienna|AT
the Hofburg|Vienna|AT
the Belvedere Palace|Vienna|AT
the Rijksmuseum|Amsterdam|NL
the Anne Frank House|Amsterdam|NL
the Van Gogh Museum|Amsterdam|NL
the Erasmus Bridge|Rotterdam|NL
the Peace Palace|The Hague|NL
the Atomium|Brussels|BE
the Manneken Pis|Brussels|BE
the Matterhorn||CH
the Jungfrau||CH
Lake Lucerne||CH
the Little Mermaid statue|Copenhagen|DK
the Tivoli Gardens|Copenhagen|DK
Kronborg Castle||DK
the Vasa Museum|Stockholm|SE
the Icehotel||SE
the Viking Ship Museum|Oslo|NO
the Geirangerfjord||NO
Preikestolen||NO
the Temppeliaukio Church|Helsinki|FI
Suomenlinna|Helsinki|FI
the Blue Lagoon||IS
Eyjafjallajökull||IS
Gullfoss||IS
the Guinness Storehouse|Dublin|IE
Temple Bar|Dublin|IE
the Cliffs of Moher||IE
Blarney Castle||IE
the Belém Tower|Lisbon|PT
the Jerónimos Monastery|Lisbon|PT
the Charles Bridge|Prague|CZ
Wenceslas Square|Prague|CZ
Karlštejn Castle||CZ
the Wawel Castle|Krakow|PL
Auschwitz||PL
the Wieliczka Salt Mine||PL
the Fisherman's Bastion|Budapest|HU
the Széchenyi Chain Bridge|Budapest|HU
Lake Balaton||HU
Bran Castle||RO
the Palace of the Parliament|Bucharest|RO
the Rila Monastery||BG
the Plitvice Lakes||HR
Diocletian's Palace||HR
Lake Bled||SI
the Postojna Cave||SI
the Stari Most bridge||BA
the Parthenon|Athens|GR
the Acropolis|Athens|GR
Mount Olympus||GR
Santorini||GR
Crete||GR
the Hagia Sophia|Istanbul|TR
the Blue Mosque|Istanbul|TR
the Grand Bazaar|Istanbul|TR
the Topkapi Palace|Istanbul|TR
Cappadocia||TR
Mount Ararat||TR
Red Square|Moscow|RU
the Kremlin|Moscow|RU
the Bolshoi Theatre|Moscow|RU
Saint Basil's Cathedral|Moscow|RU
the Hermitage Museum|Saint Petersburg|RU
Lake Baikal||RU
Mount Elbrus||RU
Chernobyl||UA
the Great Pyramid of Giza||EG
the Great Sphinx||EG
Abu Simbel||EG
the Valley of the Kings||EG
Mount Kilimanjaro||TZ
the Serengeti||TZ
the Ngorongoro Crater||TZ
the Maasai Mara||KE
Mount Kenya||KE
Table Mountain|Cape Town|ZA
Robben Island|Cape Town|ZA
the Kruger National Park||ZA
Lalibela||ET
the Hassan II Mosque|Casablanca|MA
Jemaa el-Fnaa|Marrakesh|MA
the Avenue of the Baobabs||MG
Timbuktu||ML
the Okavango Delta||BW
the Burj Khalifa|Dubai|AE
the Palm Jumeirah|Dubai|AE
the Burj Al Arab|Dubai|AE
the Sheikh Zayed Mosque|Abu Dhabi|AE
the Kaaba|Mecca|SA
Petra||JO
Persepolis||IR
Babylon||IQ
Palmyra||SY
the Umayyad Mosque|Damascus|SY
Baalbek||LB
the Taj Mahal||IN
the Red Fort|Delhi|IN
the Gateway of India|Mumbai|IN
the Lotus Temple|Delhi|IN
the Golden Temple of Amritsar||IN
the Hawa Mahal|Jaipur|IN
the Ellora Caves||IN
the Badshahi Mosque|Lahore|PK
the Faisal Mosque|Islamabad|PK
Mohenjo-daro||PK
Sigiriya||LK
Adam's Peak||LK
the Tiger's Nest monastery||BT
the Great Wall||CN
the Forbidden City|Beijing|CN
Tiananmen Square|Beijing|CN
the Summer Palace|Beijing|CN
the Temple of Heaven|Beijing|CN
the Bund|Shanghai|CN
the Oriental Pearl Tower|Shanghai|CN
the Terracotta Army|Xi’an|CN
the Three Gorges Dam||CN
Mount Fuji||JP
the Sensō-ji Temple|Tokyo|JP
Shibuya Crossing|Tokyo|JP
the Skytree|Tokyo|JP
the Fushimi Inari Shrine|Kyoto|JP
Kinkaku-ji|Kyoto|JP
Himeji Castle||JP
Itsukushima Shrine||JP
Gyeongbokgung Palace|Seoul|KR
the Lotte World Tower|Seoul|KR
Gangnam|Seoul|KR
the Juche Tower|Pyongyang|KP
Angkor Wat||KH
Ha Long Bay||VN
the Cu Chi Tunnels||VN
the Hoan Kiem Lake|Hanoi|VN
the Grand Palace|Bangkok|TH
Wat Arun|Bangkok|TH
Phuket||TH
the Petronas Towers|Kuala Lumpur|MY
the Batu Caves||MY
Mount Kinabalu||MY
Borobudur||ID
Bali||ID
Krakatoa||ID
the Chocolate Hills||PH
Boracay||PH
the Mayon Volcano||PH
the Shwedagon Pagoda|Yangon|MM
Bagan||MM
the Sydney Harbour Bridge||AU
Bondi Beach|Sydney|AU
Uluru||AU
the Great Barrier Reef||AU
the Twelve Apostles||AU
Milford Sound||NZ
Hobbiton||NZ
the Sky Tower|Auckland|NZ
the Statue of Liberty|New York City|US
the Empire State Building|New York City|US
Times Square|New York City|US
Central Park|New York City|US
the Brooklyn Bridge|New York City|US
the Golden Gate Bridge|San Francisco|US
Alcatraz|San Francisco|US
the Hollywood Sign|Los Angeles|US
the Walk of Fame|Los Angeles|US
the Willis Tower|Chicago|US
Wrigley Field|Chicago|US
the Space Needle|Seattle|US
the Pike Place Market|Seattle|US
Fenway Park|Boston|US
the Liberty Bell|Philadelphia|US
Bourbon Street|New Orleans|US
the Gateway Arch|St. Louis|US
the Alamo|San Antonio|US
Graceland|Memphis|US
the Grand Canyon||US
Mount Rushmore||US
the Yellowstone National Park||US
the Hoover Dam||US
Area 51||US
the CN Tower|Toronto|CA
Stanley Park|Vancouver|CA
Parliament Hill|Ottawa|CA
Lake Louise||CA
Chichen Itza||MX
Teotihuacan||MX
Cancún||MX
the Frida Kahlo Museum|Mexico City|MX
the Zócalo|Mexico City|MX
Tikal||GT
Christ the Redeemer|Rio de Janeiro|BR
Copacabana Beach|Rio de Janeiro|BR
Sugarloaf Mountain|Rio de Janeiro|BR
the Maracanã Stadium|Rio de Janeiro|BR
Machu Picchu||PE
the Nazca Lines||PE
the Perito Moreno Glacier||AR
the Teatro Colón|Buenos Aires|AR
the Casa Rosada|Buenos Aires|AR
Aconcagua||AR
Easter Island||CL
Torres del Paine||CL
the Galápagos Islands||EC
Chimborazo||EC
Angel Falls||VE
the Salar de Uyuni||BO
Monserrate|Bogota|CO
the Malecón|Havana|CU
El Capitolio|Havana|CU
Dunn's River Falls||JM""".splitlines()
    )
]

#: IATA code -> the airport's name as it is spoken of ("" where only the city names it) and, where
#: the list of airports names a suburb, the city it serves.
AIRPORTS = {
    code.strip(): (name.strip(), city.strip())
    for code, name, city in (
        (line.split("|") + [""])[:3]
        for line in """\
ATL|Hartsfield-Jackson Airport
LAX|
ORD|O'Hare Airport
MDW|Midway Airport
DFW||Dallas
DEN|
JFK|John F. Kennedy Airport|New York City
LGA|LaGuardia Airport|New York City
SFO|
SEA|Sea-Tac Airport|Seattle
LAS|Harry Reid Airport
MIA|
PHX|Sky Harbor Airport
IAH|George Bush Airport
HOU|William P. Hobby Airport
BOS|Logan Airport
DTW|
PHL|
DCA|Ronald Reagan Airport|Washington
IAD|Dulles Airport|Washington
DAL|Love Field
STL|Lambert Airport|St. Louis
MSY|Louis Armstrong Airport
PDX|
BNA|
YYZ|Pearson Airport|Toronto
YUL|Pierre Elliott Trudeau Airport|Montreal
YVR||Vancouver
YYC|
CDG|Charles de Gaulle Airport|Paris
ORY|Orly Airport|Paris
MRS|
LYS|Saint-Exupéry Airport|Lyon
LHR|Heathrow Airport|London
LGW|Gatwick Airport|London
STN|Stansted Airport|London
MAN|
EDI|
GLA|
FRA|
MUC|Franz Josef Strauss Airport
BER|
HAM|
AMS|Schiphol Airport
BRU|Zaventem Airport
MAD|Barajas Airport
BCN|El Prat Airport
FCO|Fiumicino Airport|Rome
CIA|Ciampino Airport|Rome
MXP|Malpensa Airport|Milan
LIN|Linate Airport|Milan
NAP||Naples
ZRH|Kloten Airport|Zurich
GVA|Cointrin Airport|Geneva
VIE|Schwechat Airport|Vienna
CPH|Kastrup Airport|Copenhagen
ARN|Arlanda Airport|Stockholm
OSL|Gardermoen Airport|Oslo
HEL|Vantaa Airport|Helsinki
KEF|Keflavík Airport|Reykjavik
DUB|
LIS|Humberto Delgado Airport
ATH|Eleftherios Venizelos Airport
IST||Istanbul
SAW|Sabiha Gökçen Airport|Istanbul
SVO|Sheremetyevo Airport|Moscow
DME|Domodedovo Airport|Moscow
VKO|Vnukovo Airport|Moscow
LED|Pulkovo Airport|Saint Petersburg
WAW|Chopin Airport
KRK|
PRG|Václav Havel Airport
BUD|Ferenc Liszt Airport
OTP|Henri Coandă Airport|Bucharest
SOF|
BEG|Nikola Tesla Airport|Belgrade
ZAG|Franjo Tuđman Airport
KBP|Boryspil Airport|Kyiv
DXB|
AUH|
DOH|Hamad Airport
RUH|King Khalid Airport
JED|King Abdulaziz Airport
TLV|Ben Gurion Airport|Tel Aviv
AMM|Queen Alia Airport|Amman
BEY|Rafic Hariri Airport
IKA|Imam Khomeini Airport|Tehran
CAI|
JNB|O. R. Tambo Airport|Johannesburg
CPT|
NBO|Jomo Kenyatta Airport
ADD|Bole Airport
LOS|Murtala Muhammed Airport
ACC|Kotoka Airport
CMN|Mohammed V Airport|Casablanca
KHI|Jinnah Airport
DEL|Indira Gandhi Airport|Delhi
BOM|Chhatrapati Shivaji Airport
BLR|Kempegowda Airport|Bangalore
CCU|Netaji Subhas Chandra Bose Airport
KTM|Tribhuvan Airport
DAC|Hazrat Shahjalal Airport
BKK|Suvarnabhumi Airport|Bangkok
DMK|Don Mueang Airport|Bangkok
KUL|
CGK|Soekarno-Hatta Airport|Jakarta
MNL|Ninoy Aquino Airport|Manila
HAN|Noi Bai Airport
SGN|Tan Son Nhat Airport|Ho Chi Minh City
ICN|Incheon Airport|Seoul
GMP|Gimpo Airport|Seoul
HND|Haneda Airport|Tokyo
NRT|Narita Airport|Tokyo
KIX|Kansai Airport|Osaka
ITM|Itami Airport|Osaka
PEK|
PKX|Daxing Airport|Beijing
PVG|Pudong Airport|Shanghai
SHA|Hongqiao Airport|Shanghai
CAN|Baiyun Airport
SYD|Kingsford Smith Airport
MEL|Tullamarine Airport|Melbourne
BNE|
PER|
AKL|
MEX|Benito Juárez Airport
GRU|Guarulhos Airport|Sao Paulo
CGH|Congonhas Airport|Sao Paulo
GIG|Galeão Airport|Rio de Janeiro
EZE|Ezeiza Airport|Buenos Aires
SCL|Arturo Merino Benítez Airport
BOG|El Dorado Airport
LIM|Jorge Chávez Airport|Lima
CCS|Simón Bolívar Airport|Caracas
HAV|José Martí Airport
UIO|Mariscal Sucre Airport""".splitlines()
    )
}

#: ISO code -> well-known companies and brands that were founded and are run there.
COMPANIES = {
    code: names.split(", ")
    for code, names in {
        "AT": "Red Bull, Swarovski",
        "AU": "Qantas, Billabong",
        "BR": "Petrobras, Embraer, Havaianas",
        "CA": "Bombardier, BlackBerry, Lululemon, Tim Hortons, Shopify",
        "CH": "Nestlé, Rolex, Novartis, UBS, Swatch, Lindt",
        "CN": "Huawei, Alibaba, Tencent, Lenovo, Xiaomi, Baidu",
        "CO": "Avianca",
        "CZ": "Škoda Auto",
        "DE": "Volkswagen, BMW, Siemens, Adidas, Bayer, Bosch, Audi, Porsche, Lufthansa, SAP, Mercedes-Benz",
        "DK": "Lego, Maersk, Carlsberg, Bang & Olufsen, Novo Nordisk",
        "ES": "Zara, SEAT, Banco Santander",
        "FI": "Nokia, Finnair, Marimekko",
        "FR": "Renault, Peugeot, Michelin, L'Oréal, Louis Vuitton, Chanel, Danone, Citroën",
        "GB": "Rolls-Royce, Barclays, Tesco, Vodafone, Burberry, Bentley, Marks & Spencer",
        "IE": "Guinness, Ryanair, Aer Lingus",
        "IN": "Tata Motors, Infosys, Wipro, Mahindra",
        "IT": "Ferrari, Fiat, Gucci, Prada, Lamborghini, Barilla, Pirelli, Versace, Maserati",
        "JP": "Toyota, Honda, Sony, Nintendo, Mitsubishi, Nissan, Mazda, Panasonic, Suzuki, Yamaha, Canon, Toshiba",
        "KE": "Safaricom",
        "KR": "Samsung, Hyundai, LG, Kia",
        "MX": "Cemex, Grupo Bimbo, Aeroméxico",
        "MY": "Petronas, AirAsia, Proton",
        "NL": "Heineken, Philips, KLM, TomTom",
        "NO": "Equinor, Telenor",
        "NZ": "Fonterra",
        "PH": "Jollibee",
        "PT": "Galp",
        "RO": "Dacia",
        "RU": "Gazprom, Aeroflot, Lada, Kaspersky, Lukoil",
        "SE": "IKEA, Volvo, Ericsson, Spotify, H&M, Electrolux",
        "TR": "Beko, Arçelik",
        "US": (
            "Apple, Microsoft, Google, Amazon, Boeing, Coca-Cola, McDonald's, Nike, Intel, Disney, "
            "Walmart, Tesla, Starbucks, Ford, Pepsi, IBM, Netflix"
        ),
    }.items()
}

#: Families of elements by mendeleev's series: the answer and others that are accepted.
FAMILIES = {
    "Actinides": ["actinide", "metal"],
    "Alkali metals": ["alkali metal", "metal"],
    "Alkaline earth metals": ["alkaline earth metal", "metal"],
    "Halogens": ["halogen", "nonmetal"],
    "Lanthanides": ["lanthanide", "rare earth metal", "rare earth element", "metal"],
    "Metalloids": ["metalloid", "semimetal"],
    "Noble gases": ["noble gas", "inert gas", "gas"],
    "Nonmetals": ["nonmetal", "non-metal"],
    "Poor metals": ["post-transition metal", "metal", "poor metal"],
    "Transition metals": ["transition metal", "metal"],
}

#: Families that others count an element in, too.
FAMILIES_TOO = {
    "astatine": ["metalloid"],
    "cadmium": ["post-transition metal"],
    "mercury": ["post-transition metal"],
    "polonium": ["post-transition metal", "metal"],
    "zinc": ["post-transition metal"],
}

#: Elements that school books and newspapers name.
ELEMENTS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Nd Sm Eu Gd Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm"
).split()
ELEMENT_ALIASES = {
    "aluminum": ["aluminium"],
    "cesium": ["caesium"],
    "sulfur": ["sulphur"],
}

#: States whose name is also that of something else, in running text.
STATES = {
    "Georgia": ("the state of Georgia", ["State of Georgia"]),
    "New York": ("the state of New York", ["New York State", "State of New York"]),
    "Washington": ("the state of Washington", ["Washington State", "State of Washington"]),
}
#: Cities that by another count are the largest of their state.
LARGEST_TOO = {"Alabama": ["Birmingham"], "West Virginia": ["Charleston"]}
