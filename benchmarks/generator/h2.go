package main

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	largeWindow = 1 << 24
	topUp       = 1 << 23
)

// h2 is one connection that speaks HTTP/2, with a fixed number of requests open at once; each that ends begins the next. All of
// it is one goroutine: what a batch of frames has made possible is written in one go.
type h2 struct {
	plan   *plan
	conn   net.Conn
	in     *bufio.Reader
	out    *bufio.Writer
	framer *http2.Framer
	coder  *hpack.Encoder
	block  bytes.Buffer
	path   []byte
	body   []byte
	next   uint32
	open   map[uint32]*stream
	credit int // bytes that we may still send
	debt   int // bytes that the server has sent and we have not allowed again
	gone   bool
}

type stream struct {
	began  time.Time
	status string
	grpc   string
	length int
}

func newH2(p *plan, conn net.Conn) (*h2, error) {
	c := &h2{
		plan: p, conn: conn, in: bufio.NewReaderSize(conn, 1<<16), out: bufio.NewWriterSize(conn, 1<<16),
		next: 1, open: map[uint32]*stream{}, credit: 65535, body: bytes.Repeat([]byte("x"), p.Body),
	}
	if p.GRPC { // one message: not compressed, its length, its bytes
		c.body = append([]byte{0, 0, 0, byte(p.Body >> 8), byte(p.Body)}, c.body...)
	}
	c.framer = http2.NewFramer(c.out, c.in)
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.framer.SetReuseFrames()
	c.coder = hpack.NewEncoder(&c.block)
	if _, err := c.out.WriteString(http2.ClientPreface); err != nil {
		return nil, err
	}
	if err := c.framer.WriteSettings(
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: largeWindow},
	); err != nil {
		return nil, err
	}
	if err := c.framer.WriteWindowUpdate(0, largeWindow); err != nil {
		return nil, err
	}
	return c, c.out.Flush()
}

func (c *h2) run(_, until time.Time, t *tally) {
	if c.gone {
		return
	}
	_ = c.conn.SetDeadline(until.Add(patience))
	if err := c.load(until, t); err != nil {
		t.failed(reason(err))
		c.gone = true
		_ = c.conn.Close()
	}
}

func (c *h2) load(until time.Time, t *tally) error {
	for range c.plan.Streams {
		if err := c.begin(); err != nil {
			return err
		}
	}
	for len(c.open) > 0 {
		if c.in.Buffered() == 0 {
			if err := c.out.Flush(); err != nil {
				return err
			}
		}
		frame, err := c.framer.ReadFrame()
		if err != nil {
			return err
		}
		if err := c.take(frame, until, t); err != nil {
			return err
		}
	}
	return c.out.Flush()
}

func (c *h2) begin() error {
	c.block.Reset()
	c.path = c.plan.path(c.path[:0])
	fields := []hpack.HeaderField{
		{Name: ":method", Value: c.plan.Method},
		{Name: ":scheme", Value: "https"},
		{Name: ":authority", Value: c.plan.Address},
		{Name: ":path", Value: string(c.path)},
		{Name: "user-agent", Value: "load"},
	}
	if c.plan.GRPC {
		fields = append(fields, hpack.HeaderField{Name: "content-type", Value: "application/grpc"},
			hpack.HeaderField{Name: "te", Value: "trailers"})
	}
	for _, field := range fields {
		if err := c.coder.WriteField(field); err != nil {
			return err
		}
	}
	id := c.next
	c.next += 2
	c.open[id] = &stream{began: time.Now()}
	if err := c.framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: id, BlockFragment: c.block.Bytes(), EndHeaders: true, EndStream: len(c.body) == 0,
	}); err != nil {
		return err
	}
	if len(c.body) == 0 {
		return nil
	}
	if c.credit -= len(c.body); c.credit < 0 {
		return fmt.Errorf("the server allows no more bytes")
	}
	return c.framer.WriteData(id, true, c.body)
}

func (c *h2) take(frame http2.Frame, until time.Time, t *tally) error {
	switch frame := frame.(type) {
	case *http2.MetaHeadersFrame:
		one := c.open[frame.StreamID]
		if one == nil {
			return fmt.Errorf("an answer on a stream that is not open")
		}
		for _, field := range frame.Fields {
			switch field.Name {
			case ":status":
				one.status = field.Value
			case "grpc-status":
				one.grpc = field.Value
			}
		}
		if frame.StreamEnded() {
			return c.end(frame.StreamID, one, until, t)
		}
	case *http2.DataFrame:
		one := c.open[frame.StreamID]
		if one == nil {
			return fmt.Errorf("data on a stream that is not open")
		}
		one.length += len(frame.Data())
		if c.debt += int(frame.Length); c.debt > topUp {
			if err := c.framer.WriteWindowUpdate(0, uint32(c.debt)); err != nil {
				return err
			}
			c.debt = 0
		}
		if frame.StreamEnded() {
			return c.end(frame.StreamID, one, until, t)
		}
	case *http2.SettingsFrame:
		if !frame.IsAck() {
			return c.framer.WriteSettingsAck()
		}
	case *http2.PingFrame:
		if !frame.IsAck() {
			return c.framer.WritePing(true, frame.Data)
		}
	case *http2.WindowUpdateFrame:
		if frame.StreamID == 0 {
			c.credit += int(frame.Increment)
		}
	case *http2.RSTStreamFrame:
		if c.open[frame.StreamID] != nil { // else the rest of a body that was not wanted any more
			delete(c.open, frame.StreamID)
			t.failed("RST_STREAM " + frame.ErrCode.String())
			if time.Now().Before(until) {
				return c.begin()
			}
		}
	case *http2.GoAwayFrame:
		return fmt.Errorf("GOAWAY %s", frame.ErrCode)
	}
	return nil
}

func (c *h2) end(id uint32, one *stream, until time.Time, t *tally) error {
	delete(c.open, id)
	now := time.Now()
	switch {
	case !strings.HasPrefix(one.status, "2"):
		t.failed(one.status)
	case c.plan.GRPC && one.grpc != "0":
		t.failed("grpc-status " + one.grpc)
	case one.length != c.plan.Answer:
		t.failed(fmt.Sprintf("%d and not %d long", one.length, c.plan.Answer))
	default:
		t.answers++
		t.units++
		t.took(now.Sub(one.began))
	}
	if now.Before(until) {
		return c.begin()
	}
	return nil
}
