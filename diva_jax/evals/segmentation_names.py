"""Names of the classes of segmentation sets, as texts for an encoder; synonyms are separated by commas."""

VOC = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,potted plant,"
    "sheep,sofa,train,tv monitor"
).split(",")
BACKGROUND = (
    "background, sky, wall, tree, wood, grass, road, sea, river, mountain, sand, desk, bed, building, cloud, lamp, "
    "door, window, wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail, fence"
)
CITYSCAPES = (
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,"
    "truck,bus,train,motorcycle,bicycle"
).split(",")
# PASCAL Context's 59 classes, in the order of their values.
CONTEXT = (
    "aeroplane,bag,bed,bedclothes,bench,bicycle,bird,boat,book,bottle,building,bus,cabinet,car,cat,ceiling,chair,"
    "cloth,computer,cow,cup,curtain,dog,door,fence,floor,flower,food,grass,ground,horse,keyboard,light,motorbike,"
    "mountain,mouse,person,plate,platform,potted plant,road,rock,sheep,shelves,sidewalk,sign,sky,snow,sofa,table,"
    "track,train,tree,truck,tv monitor,wall,water,window,wood"
).split(",")
# COCO's 80 objects.
COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,"
    "suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
# COCO-Stuff's 91 classes of stuff. The published names are like wall-brick and wall-other.
STUFF = (
    "banner,blanket,branch,bridge,building,bush,cabinet,cage,cardboard,carpet,ceiling,tile ceiling,cloth,clothes,"
    "clouds,counter,cupboard,curtain,desk,dirt,door,fence,marble floor,floor,stone floor,tile floor,wood floor,"
    "flower,fog,food,fruit,furniture,grass,gravel,ground,hill,house,leaves,light,mat,metal,mirror,moss,mountain,"
    "mud,napkin,net,paper,pavement,pillow,plant,plastic,platform,playing field,railing,railroad,river,road,rock,"
    "roof,rug,salad,sand,sea,shelf,sky,skyscraper,snow,solid,stairs,stone,straw,structure,table,tent,textile,towel,"
    "tree,vegetable,brick wall,concrete wall,wall,panel wall,stone wall,tile wall,wood wall,water,waterdrops,"
    "window blind,window,wood"
).split(",")
# The value of a pixel is the class's number in COCO less one; these numbers of objects are not used.
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
STUFF_VALUES = tuple(n - 1 for n in range(1, 183) if n not in _UNUSED)
