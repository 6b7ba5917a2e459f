"Files of images as people have them: damaged, odd, mislabelled"
import io, struct, zlib
import numpy as np, simplejpeg
from PIL import Image
from fastai_fastimagenet.photos import render

pillow,progressive = 'not a fast JPEG (PNG, CMYK, ...): decoded by Pillow','progressive JPEG'

def turned(o): return f'EXIF orientation {o}, ignored'

def saved(im, format='JPEG', **kw):
    out = io.BytesIO()
    im.save(out, format, **({'quality':92} if format=='JPEG' else {})|kw)
    return out.getvalue()

def exif(o):
    e = Image.Exif()
    e[0x0112] = o
    return e

def segment(marker, data): return bytes([0xff,marker])+struct.pack('>H', len(data)+2)+data

def inserted(b, *segments): return b[:2]+b''.join(segments)+b[2:]

def sof(b): return b.index(b'\xff\xc0')

def patched(b, **bytes_at):
    "JPEG `b` with other bytes in its start of frame: marker, precision, height, width"
    i,places = sof(b),dict(marker=1, precision=4, height=5, width=7)
    b = bytearray(b)
    for k,v in bytes_at.items(): b[i+places[k]:i+places[k]+len(v)] = v
    return bytes(b)

def chunk(kind, data):
    "Of a PNG"
    return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))

def broken_files():
    "Name -> content of files that are no whole image"
    im = render(5, short=96)[0]
    b,png,prog = saved(im),saved(im, 'PNG'),saved(im, progressive=True)
    scan,n = b.index(b'\xff\xda'),len(b)
    mid = (scan+n)//2
    return {
        'empty.jpg': b'', 'one byte.jpg': b'\xff', 'zeros.jpg': bytes(5000), 'text.jpg': b'hello '*99, 'random.JPEG': np.random.default_rng(0).bytes(9000),
        'page.jpg': b'<!DOCTYPE html><html><body>404 <b>Not Found</b></body></html>',
        'cut start.jpg': b[:2], 'cut tables.jpg': b[:100], 'cut frame.jpg': b[:sof(b)+6], 'cut before scan.jpg': b[:scan], 'cut scan.jpg': b[:mid],
        'cut last row.jpg': b[:n-40], 'cut last byte.jpg': b[:-1], 'no end.jpg': b[:-2],
        'marker in scan.jpg': b[:mid]+b'\xff\xc4\0\0'+b[mid+4:], 'wrong restart.jpg': b[:mid]+b'\xff\xd3'+b[mid+2:],
        'no height.jpg': patched(b, height=b'\0\0'), 'bomb.jpg': patched(b, height=b'\xff\xdc', width=b'\xff\xdc'),
        'lossless.jpg': patched(b, marker=b'\xc3'), 'twelve bits.jpg': patched(b, precision=b'\x0c'), 'hierarchical.jpg': patched(b, marker=b'\xc5'),
        'cut progressive.jpg': prog[:len(prog)//2], 'cut CMYK.jpg': saved(im.convert('CMYK'))[:-3000], 'restart in CMYK.jpg': (c := saved(im.convert('CMYK')))[:9000]+b'\xff\xd3'+c[9002:],
        'cut.png': png[:len(png)//2], 'no checksum.png': png[:100]+b'????'+png[104:], 'bomb.png': png[:8]+chunk(b'IHDR', struct.pack('>IIBBBBB', 65536, 65536, 8, 2, 0, 0, 0))+png[33:], 'cut.gif': saved(im, 'GIF')[:900],
        'cut.webp': saved(im, 'WEBP')[:900], 'cut.bmp': saved(im, 'BMP')[:9000], 'cut.tif': saved(im, 'TIFF')[:9000], 'junk.ico': b'\0\0\1\0junk', 'drawing.svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        'tab\tand\nline.jpg': b'', '<i>&amp;.jpg': b'x', b'not utf-8 \xff\xfe.jpg': b'', 'it\'s "quoted"|piped.jpg': b'', 'line\u2028separator.jpg': b'',
    }

def odd_files():
    "Name -> content and what is odd, '' if nothing, of files that are whole images"
    im = render(7, short=96)[0]
    w,h = im.size
    rgb,b = np.asarray(im),saved(im)
    a = Image.fromarray(np.linspace(0, 255, w*h).reshape(h, w).astype(np.uint8))
    deep = (np.asarray(im.convert('L'), np.uint16)*257)
    clear = im.quantize(64)
    clear.info['transparency'] = bytes([0,128]+[255]*62)
    with_alpha,gray_alpha = im.copy(),im.convert('L')
    with_alpha.putalpha(a)
    gray_alpha.putalpha(a)
    frames = [im,im.rotate(180)]
    sub = lambda s: simplejpeg.encode_jpeg(rgb, 92, 'RGB', s)
    res = {
        'png.JPEG': (saved(im, 'PNG'),pillow), 'really jpeg.png': (b,''), 'a.gif': (saved(im, 'GIF'),pillow), 'animated.gif': (saved(im, 'GIF', save_all=True, append_images=frames[1:]),pillow),
        'a.bmp': (saved(im, 'BMP'),pillow), 'a.tif': (saved(im, 'TIFF'),pillow), 'lzw.tiff': (saved(im, 'TIFF', compression='tiff_lzw'),pillow), 'pages.tif': (saved(im, 'TIFF', save_all=True, append_images=frames[1:]),pillow),
        'a.webp': (saved(im, 'WEBP', quality=95),pillow), 'lossless.webp': (saved(im, 'WEBP', lossless=True),pillow), 'clear.webp': (saved(with_alpha, 'WEBP', lossless=True),pillow),
        'gray.jpg': (saved(im.convert('L')),''), 'gray.png': (saved(im.convert('L'), 'PNG'),pillow), 'gray alpha.png': (saved(gray_alpha, 'PNG'),pillow), 'alpha.png': (saved(with_alpha, 'PNG'),pillow),
        'palette.png': (saved(im.quantize(64), 'PNG'),pillow), 'clear palette.png': (saved(clear, 'PNG'),pillow), 'clear colour.png': (saved(im, 'PNG', transparency=(1,2,3)),pillow),
        'one bit.png': (saved(im.convert('1'), 'PNG'),pillow), 'deep.png': (saved(Image.fromarray(deep), 'PNG'),pillow), 'deep.tif': (saved(Image.fromarray(deep), 'TIFF'),pillow),
        'deep32.tif': (saved(Image.fromarray(deep.astype(np.int32)), 'TIFF'),pillow), 'deep big endian.tif': (saved(Image.fromarray(deep.astype('>u2')), 'TIFF'),pillow),
        'float.tif': (saved(Image.fromarray(deep.astype(np.float32)/257), 'TIFF'),pillow), 'deep.pgm': (b'P5 %d %d 65535\n'%(w,h)+deep.astype('>u2').tobytes(),pillow),
        'deep rgb.png': (deep_png(rgb.astype(np.uint16)*257),pillow), 'lab.tif': (saved(lab(im), 'TIFF'),pillow),
        'cmyk.jpg': (saved(im.convert('CMYK')),pillow), 'ycck.jpg': (simplejpeg.encode_jpeg(np.ascontiguousarray(255-np.asarray(im.convert('CMYK'))), 92, 'CMYK', '420'),pillow), 'rgb.jpg': (saved(im, keep_rgb=True),''),
        'progressive.jpg': (saved(im, progressive=True),progressive), 'progressive gray.jpg': (saved(im.convert('L'), progressive=True),progressive),
        'progressive turned.jpg': (saved(im, progressive=True, exif=exif(6)),f'{progressive} and {turned(6)}'),
        'restarts.jpg': (saved(im, restart_marker_blocks=3),''), 'restart rows.jpg': (saved(im, restart_marker_rows=1),''),
        '444.jpg': (sub('444'),''), '422.jpg': (sub('422'),''), '440.jpg': (sub('440'),''), '411.jpg': (sub('411'),''), 'junk after.jpg': (b+b'junk'*999,''),
        'twice.jpg': (b+b,''), 'mpo.jpg': (saved(im, 'MPO', quality=92, save_all=True, append_images=frames[1:]),''),
        'long comment.jpg': (inserted(b, segment(0xfe, b'.'*60000), segment(0xfe, b'\xff\xd8\xff\xc0'*9999)),''), 'fill bytes.jpg': (b[:2]+b'\xff'*7+b[2:],''),
        'bad exif.jpg': (inserted(b, segment(0xe1, b'Exif\0\0MM\0*\xff\xff\xff\xff')),''), 'bad exif 2.jpg': (inserted(b, segment(0xe1, b'Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01')),''),
        'exif orientation 99.jpg': (saved(im, exif=exif(99)),''), 'bad exif CMYK.jpg': (inserted(saved(im.convert('CMYK')), segment(0xe1, b'Exif\0\0MM\0*\xff\xff\xff\xff')),pillow),
        'bad exif.png': (saved(im, 'PNG', exif=b'Exif\0\0not TIFF'),pillow), 'turned.png': (saved(im, 'PNG', exif=exif(8)),f'{pillow} and {turned(8)}'),
        'turned.webp': (saved(im, 'WEBP', quality=95, exif=exif(3)),f'{pillow} and {turned(3)}'), 'turned.tif': (saved(im, 'TIFF', exif=exif(6)),pillow),
        'one pixel.jpg': (saved(im.resize((1,1))),''), 'wide.jpg': (saved(im.resize((2000,1))),''), 'tall.jpg': (saved(im.resize((1,2000))),''), 'one pixel.png': (saved(im.resize((1,1)), 'PNG'),pillow),
        'good\ttab\nline.png': (saved(im, 'PNG'),pillow), '<b>&lt;.png': (saved(im, 'PNG'),pillow), b'\xff\xfe.gif': (saved(im, 'GIF'),pillow), 'ä €.gif': (saved(im, 'GIF'),pillow),
    }
    return res|{f'turned {o}.jpg': (saved(im, exif=exif(o)),turned(o)) for o in range(2, 9)}

def lab(im):
    from PIL import ImageCms
    return ImageCms.profileToProfile(im, ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), outputMode='LAB')

def deep_png(a):
    "PNG of 16 bits per channel"
    h,w,_ = a.shape
    rows = b''.join(b'\0'+r.astype('>u2').tobytes() for r in a)
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, 2, 0, 0, 0))+chunk(b'IDAT', zlib.compress(rows))+chunk(b'IEND', b'')
