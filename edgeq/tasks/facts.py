"""Plain facts and words, from which the items of ``edgeq.tasks.kick`` are made."""

CAPITALS = {
    "Albania": "Tirana", "Argentina": "Buenos Aires", "Australia": "Canberra",
    "Austria": "Vienna", "Belgium": "Brussels", "Brazil": "Brasília", "Bulgaria": "Sofia",
    "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogotá",
    "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen", "Ecuador": "Quito",
    "Egypt": "Cairo", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta",
    "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome",
    "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi",
    "Latvia": "Riga", "Lebanon": "Beirut", "Lithuania": "Vilnius", "Malaysia": "Kuala Lumpur",
    "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", "Nepal": "Kathmandu",
    "New Zealand": "Wellington", "Nigeria": "Abuja", "Norway": "Oslo", "Pakistan": "Islamabad",
    "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest",
    "Russia": "Moscow", "Saudi Arabia": "Riyadh", "Senegal": "Dakar", "Serbia": "Belgrade",
    "Slovakia": "Bratislava", "Slovenia": "Ljubljana", "South Korea": "Seoul", "Spain": "Madrid",
    "Sweden": "Stockholm", "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara",
    "Ukraine": "Kyiv", "the United Kingdom": "London", "Uruguay": "Montevideo",
    "Venezuela": "Caracas", "Vietnam": "Hanoi", "Zimbabwe": "Harare",
}  # fmt: skip
OTHER_SPELLINGS = {
    "Brasília": "Brasilia",
    "Bogotá": "Bogota",
    "Kyiv": "Kiev",
    "Brontë": "Bronte",
}

# none whose symbol is an English word
SYMBOLS = {
    "hydrogen": "H", "helium": "He", "lithium": "Li", "carbon": "C", "nitrogen": "N",
    "oxygen": "O", "fluorine": "F", "neon": "Ne", "sodium": "Na", "magnesium": "Mg",
    "aluminium": "Al", "silicon": "Si", "phosphorus": "P", "sulfur": "S", "chlorine": "Cl",
    "potassium": "K", "calcium": "Ca", "titanium": "Ti", "iron": "Fe", "nickel": "Ni",
    "copper": "Cu", "zinc": "Zn", "silver": "Ag", "tin": "Sn", "gold": "Au", "mercury": "Hg",
    "lead": "Pb", "uranium": "U", "platinum": "Pt", "tungsten": "W",
}  # fmt: skip

AUTHORS = {
    "Romeo and Juliet": "Shakespeare", "Don Quixote": "Cervantes", "War and Peace": "Tolstoy",
    "Pride and Prejudice": "Austen", "Oliver Twist": "Dickens", "Faust": "Goethe",
    "The Divine Comedy": "Dante", "Crime and Punishment": "Dostoevsky", "Moby-Dick": "Melville",
    "Les Misérables": "Hugo", "Frankenstein": "Shelley", "Dracula": "Stoker", "1984": "Orwell",
    "The Odyssey": "Homer", "Madame Bovary": "Flaubert", "The Hobbit": "Tolkien",
    "Jane Eyre": "Brontë", "The Metamorphosis": "Kafka", "Walden": "Thoreau",
    "The Adventures of Tom Sawyer": "Twain",
}  # fmt: skip

YOUNG = {
    "cat": "kitten", "dog": "puppy", "cow": "calf", "sheep": "lamb", "horse": "foal",
    "goat": "kid", "lion": "cub", "duck": "duckling", "goose": "gosling", "swan": "cygnet",
}  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DIRECTIONS = ("north", "east", "south", "west")

KINDS = {
    "animals": ("dog", "horse", "tiger", "rabbit", "goat", "wolf"),
    "fruits": ("apple", "pear", "plum", "cherry", "banana", "grape"),
    "tools": ("hammer", "saw", "wrench", "drill", "chisel", "pliers"),
    "colours": ("red", "blue", "green", "yellow", "purple", "orange"),
    "instruments": ("violin", "flute", "drum", "trumpet", "piano", "cello"),
    "clothes": ("shirt", "coat", "sock", "glove", "scarf", "hat"),
}

FIRST_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate",
    "Leo", "Maria", "Noah", "Olga", "Peter", "Rosa", "Simon", "Tina", "Victor",
)  # fmt: skip
LAST_NAMES = (
    "Keller", "Moreau", "Silva", "Novak", "Larsen", "Costa", "Weber", "Marsh", "Okafor", "Lind",
    "Rossi", "Tanaka",
)  # fmt: skip
VILLAGES = (
    "Almbach", "Brookton", "Carrowby", "Dunfield", "Estling", "Farleigh", "Grunau", "Hallow",
    "Invermoor", "Kestrel", "Lindholm", "Marwick", "Norden", "Oakham", "Pellworth", "Quarley",
)  # fmt: skip
TRADES = ("fishing", "cheese", "glass", "timber", "wool", "pottery", "honey", "salt")
SIGHTS = (
    "an old stone bridge", "a round tower", "a mill with two wheels", "a small museum",
    "a wooden church", "a market hall", "a lighthouse", "a garden of roses",
)  # fmt: skip
THINGS = ("key", "letter", "ring", "map", "violin", "wallet", "umbrella", "camera", "notebook")
PLACES = ("library", "station", "bakery", "harbour", "school", "theatre", "garden", "museum")
TOPICS = (
    "rain", "the sea", "bread", "winter", "trains", "music", "horses", "the moon", "tea", "a river",
    "gardens", "books",
)  # fmt: skip
LAST_WORDS = ("morning", "together", "home", "water", "silence", "again")
WANTED_WORDS = ("window", "silver", "quickly", "friend", "north", "seven")
