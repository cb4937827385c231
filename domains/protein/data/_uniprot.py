"""Labels read off the headers of UniProt: enzyme class from the protein's name, superkingdom from the organism's.

The sample's headers have no EC number and no taxonomy, so these labels are as good as the rules below and no better.
What a rule cannot tell for sure is left out and counted.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ENZYME_CLASSES = ("oxidoreductase", "transferase", "hydrolase", "lyase", "isomerase", "ligase")
"""The first six classes of the Enzyme Commission, in their order; the seventh, translocases, has too few names."""

SUPERKINGDOMS = ("archaea", "bacteria", "eukaryota", "viruses")


class Header(NamedTuple):
    """What a FASTA header of UniProt says: accession, name of the protein, name of the organism."""

    accession: str
    protein: str
    organism: str


_HEADER = re.compile(r"(?:sp|tr)\|([^|]+)\|\S+ (.+?) OS=(.+?)(?: (?:OX|GN|PE|SV)=.*)?$")


def parse_header(text: str) -> Header | None:
    """Read a header without its ">"; None if it is not UniProt's."""
    found = _HEADER.match(text)
    return Header(*found.groups()) if found else None


# Read in this order against the end of a name: an ending that contains another one stands before it.
_ENDINGS = (
    ("oxidoreductase", "reductoisomerase"),
    ("isomerase", "isomerase|(?<!dis)mutase|epimerase|racemase|gyrase"),
    (
        "oxidoreductase",
        "reductase|dehydrogenase|hydrogenase|oxidase|oxygenase|hydroxylase|desaturase|catalase|superoxide dismutase",
    ),
    ("transferase", "transferase|kinase|polymerase|primase|transaminase|transketolase|transaldolase|ubiquitin.*ligase"),
    (
        "lyase",
        "lyase|decarboxylase|dehydratase|aldolase|enolase|hydratase|anhydrase|chelatase|"
        "bisphosphate carboxylase|phosphoenolpyruvate carboxylase",
    ),
    ("ligase", "ligase|synthetase|carboxylase"),
    (
        "hydrolase",
        "hydrolase|protease|proteinase|peptidase|phosphatase|nuclease|lipase|esterase|osidase|amylase|deaminase|"
        "deacetylase|deacylase|amidase|gtpase|chitinase|urease|trehalase|deformylase|glycosylase|asparaginase|"
        "glutaminase|dehalogenase|cellulase|glucanase|xylanase|galacturonase|sialidase|neuraminidase|sulfatase|lactamase",
    ),
)
_ENZYME = [(name, re.compile(f"(?:{endings})$")) for name, endings in _ENDINGS]

# Not an enzyme itself, or part of one, or two of them, or a class that was moved (transporters are translocases now).
_NO_ENZYME = re.compile(
    r"inhibit|activat|regulat|subunit|chain|component|like|domain|binding|associated|accessory|assembly|matur|"
    r"factor|homolog|leader|receptor|transport|translocat|export|bifunctional|multifunctional|/|substrate|"
    r"ribose-phosphate|phosphate synthetase|ppgpp|transferase-isomerase|transglycosylase|anchor|adapter|interacting"
)
# "Ribosomal RNA small subunit methyltransferase A": what it works on, and which one it is.
_OBJECT = re.compile(r"ribosomal rna (?:small|large) subunit")
# "[NADP(+)]", "(Fragment)", "(EC 1.1.1.1)".
_REMARK = re.compile(r"\s+(?:\[[^\[\]]*\]|\([^()]*\))$")
_MOST_ENDINGS = 2  # remarks and designations that are set aside
_DESIGNATION = re.compile(r",? (?:[a-z0-9]{1,5}|alpha|beta|gamma|delta|epsilon|putative|mitochondrial|chloroplastic)$")


def enzyme_class(protein: str) -> str | None:
    """Read the enzyme class off a protein's name; None where the name does not say it.

    The name has to end with a known ending ("-kinase", "-dehydrogenase"), a remark in brackets and a short
    designation behind it set aside. Names of subunits, of several enzymes or of what binds or regulates an enzyme are
    not used.
    """
    name = _OBJECT.sub("rrna", protein.lower()).replace("serine/threonine", "serine-threonine")
    if _NO_ENZYME.search(name):
        return None
    for _ in range(_MOST_ENDINGS):
        if name.endswith("ase"):
            break
        name = _DESIGNATION.sub("", _REMARK.sub("", name))
    return next((enzyme for enzyme, ending in _ENZYME if ending.search(name)), None)


_VIRUS = re.compile(r"virus|phage\b|viroid|\bviral", re.IGNORECASE)

# Genera with at least a handful of proteins in the sample.
_ARCHAEA = """
Sulfolobus Thermococcus Methanocaldococcus Methanococcus Methanosarcina Pyrobaculum Pyrococcus Archaeoglobus
Methanoculleus Thermoplasmatales Methanotorris Methanobrevibacter Metallosphaera Thermoproteus Methanothermobacter
Methanobacterium Haloferax Methanothermococcus Acidianus Vulcanisaeta Methanosaeta Thermoplasma Ferroplasma Geoglobus
Methanoregula Sulfolobales Acidiplasma Caldivirga Palaeococcus Ferroglobus Methanocella Halorubrum Pyrodictium
Desulfurococcus Methanosphaera Haloarcula Methanococcoides Methanospirillum Aeropyrum Methanobacteriaceae
Methanohalophilus Methanothermus Thermococcales Methanofollis Methanosphaerula Ignicoccus Hyperthermus Methanopyrus
Pyrolobus Methanoperedens Acidilobus
"""
_BACTERIA = """
Rickettsia Mycobacterium Escherichia Bacillus Pseudomonas Chlamydia Staphylococcus Ureaplasma Streptococcus Mycoplasma
Treponema Lactobacillus Lactococcus Vibrio Prochlorococcus Clostridium Bacteroides Salmonella Chlorobium Burkholderia
Francisella Leptospira Shewanella Borrelia Synechococcus Wolbachia Streptomyces Campylobacter Thermotoga Desulfovibrio
Listeria Anaplasma Haemophilus Yersinia Xanthomonas Buchnera Shigella Neisseria Klebsiella Ehrlichia Geobacter Brucella
Helicobacter Deinococcus Enterococcus Psychrobacter Dehalococcoides Rhizobium Bifidobacterium Corynebacterium
Fusobacterium Ralstonia Thermus Bordetella Borreliella Peptoclostridium Rhodopirellula Geobacillus Thermoanaerobacter
Anaeromyxobacter Bradyrhizobium Porphyromonas Spiroplasma Actinobacillus Acinetobacter Rhodococcus Pectobacterium
Arcobacter Aeromonas Caldicellulosiruptor Microcystis Sorangium Finegoldia Orientia Myxococcus Methylobacterium
Propionibacterium Agrobacterium Brachyspira Caulobacter Thermosipho Thermoanaerobacterium Halomonas Proteus
Prosthecochloris Stenotrophomonas Xylella Legionella Photobacterium Marinobacter Pasteurella Mesorhizobium Nostoc
Xenorhabdus Pseudoalteromonas Rhodobacter Leuconostoc Desulfuromonas Sinorhizobium Gluconobacter Paenibacillus Mesotoga
Moraxella Pseudothermotoga Serratia Exiguobacterium Aquifex Blochmannia Thermocrinis Hydrogenivirga Coxiella Marinitoga
Hydrogenobaculum Cupriavidus Sulfurihydrogenibium Parabacteroides Chloroflexus Meiothermus Desulfotomaculum Bilophila
Achromobacter Chlorobaculum Moorella Dickeya Arthrobacter Brevundimonas Chloroherpeton Frankia Fervidobacterium
Cyanobium Desulfitobacterium Komagataeibacter Thauera Rhodopseudomonas Geoalkalibacter Mannheimia Pantoea
Caldanaerobacter Smithella Providencia Magnetospirillum Pelobacter Hydrogenobacter Pediococcus Marinomonas Alcanivorax
Nitrosomonas Pelodictyon Chlamydophila Scytonema Roseiflexus Cellulomonas Idiomarina Mesoplasma Paraburkholderia
Hyphomonas Enterobacter Desulfococcus Alteromonas Cronobacter Persephonella Bdellovibrio Acidovorax Methylophaga Devosia
Eubacterium Weissella Corallococcus Colwellia Pandoraea Photorhabdus Azoarcus Sphingobium Sulfurovum Edwardsiella
Granulicella Bosea Herbaspirillum Acetobacter Sulfurospirillum Neoehrlichia Phytoplasma Baumannia
"""
_EUKARYOTA = """
Brassica Drosophila Candida Caenorhabditis Arabidopsis Oryza Homo Macaca Mus Solanum Saccharomyces Eutrema Glycine
Capsella Rattus Pan Gorilla Bos Dictyostelium Citrus Callithrix Gossypium Plasmodium Chlorocebus Phaseolus Arabis
Cryptococcus Aspergillus Pongo Ancylostoma Mustela Myotis Bactrocera Xenopus Sus Ailuropoda Papio Zea Ovis Medicago
Triticum Theobroma Otolemur Populus Nomascus Canis Trichophyton Oryctolagus Cricetulus Fundulus Felis Loxodonta Conus
Cavia Strongyloides Erythranthe Ictidomys Vitis Monodelphis Equus Bombyx Prunus Heterocephalus Cucumis Vigna Danio
Hordeum Ricinus Morus Cajanus Setaria Jatropha Takifugu Cynara Sarcophilus Pteropus Eucalyptus Polysphondylium
Acanthamoeba Anopheles Toxoplasma Daphnia Coccidioides Oncorhynchus Lepisosteus Encephalitozoon Musa Penicillium Gallus
Ascaris Brachypodium Trichinella Spinacia Brugia Schizosaccharomyces Fukomys Tetraodon Haemonchus Leersia Crotalus
Latimeria Picea Debaryomyces Fusarium Paramecium Tupaia Camelus Oryzias Parastrongyloides Neovison Lucilia Sorghum
Coffea Ceratitis Schistosoma Anas Astyanax Oreochromis Angiostrongylus Scleropages Thelazia Apis Pinus Oesophagostomum
Necator Alligator Genlisea Neosartorya Amborella Aegilops Rhipicephalus Naja Pichia Aedes Androctonus Loa Ambystoma
Poecilia Kluyveromyces Toxocara Rhodnius Gasterosteus Strongylocentrotus Selaginella Onchocerca Chilobrachys Bungarus
Xiphophorus Haplopelma Trypanosoma Chelonia Ipomoea Zygosaccharomyces Pristionchus Ornithorhynchus Entamoeba Ixodes
Scheffersomyces Leishmania Ashbya Taeniopygia Dictyocaulus Pisum Callorhinchus Anthopleura Solenopsis Echis Meleagris
Mytilus Lycosa Spathaspora Clavispora Meyerozyma Mesobuthus Desmodus Atta Lampetra Pyropia Lygus Ficedula Ustilago
Enterobius Ophiophagus Ajellomyces Musca Sporisorium Boiga Helianthus Anolis Giardia Nematostella Poeciliopsis Zostera
Torulaspora Cryptosporidium Branchiostoma Charadrius Phyllomedusa Pelodiscus Nicotiana Locusta Chrysanthemum
Nippostrongylus Neurospora Agelena Cryphonectria Karoophasma Dendroaspis Physcomitrella Cuculus Lachancea Pygoscelis
Periplaneta Ictalurus Rana Egretta Pinctada Cochliobolus Arachis Capra Salmo Tityus Hypocrea Nosema Arthroderma Micrurus
Litoria Artemisia Flaveria
"""
_GENUS = {
    genus: kingdom
    for kingdom, genera in zip(SUPERKINGDOMS, (_ARCHAEA, _BACTERIA, _EUKARYOTA), strict=False)
    for genus in genera.split()
}


def superkingdom(organism: str) -> str | None:
    """Read the superkingdom off an organism's name; None where the name does not say it.

    Names with "virus", "phage", "viroid" or "viral" are viruses; else the genus is looked up, behind "Candidatus" and
    "uncultured" too, and "bacterium" or "archaeon" as the second word decides. Organisms named after their host
    ("endosymbiont of ...") and metagenomes are not used.
    """
    if _VIRUS.search(organism):
        return "viruses"
    words = [word.strip("[]'") for word in organism.split()]
    if words[0] in ("Candidatus", "uncultured") and len(words) > 1:
        words = words[1:]
    if words[0] in _GENUS:
        return _GENUS[words[0]]
    said = {"bacterium": "bacteria", "archaeon": "archaea"}
    return next((said[word] for word in words[:2] if word in said), None)
