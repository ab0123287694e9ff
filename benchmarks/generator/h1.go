package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/http/httputil"
	"strconv"
	"time"
)

// h1 is one connection that speaks HTTP/1.1, one request at a time.
type h1 struct {
	plan   *plan
	dialer *dialer
	conn   net.Conn
	in     *bufio.Reader
	out    []byte
	rest   []byte // of the request, from behind the path on
	random *rand.Rand
	closed bool // the server said that it would end the connection
}

func newH1(p *plan, d *dialer, conn net.Conn, random *rand.Rand) *h1 {
	rest := fmt.Appendf(nil, " HTTP/1.1\r\nHost: %s\r\nUser-Agent: load\r\n", p.Address)
	if p.Shape == "fresh" {
		rest = append(rest, "Connection: close\r\n"...)
	}
	if p.Body > 0 {
		rest = fmt.Appendf(rest, "Content-Type: application/octet-stream\r\nContent-Length: %d\r\n", p.Body)
	}
	rest = append(rest, "\r\n"...)
	rest = append(rest, bytes.Repeat([]byte("x"), p.Body)...)
	return &h1{plan: p, dialer: d, conn: conn, in: bufio.NewReaderSize(conn, 1<<16), rest: rest, random: random}
}

func (c *h1) run(start, until time.Time, t *tally) {
	defer c.deadline(until)()
	if c.plan.Rate > 0 {
		c.scheduled(start, until, t)
		return
	}
	for began := time.Now(); began.Before(until); {
		if !c.once(t) {
			return
		}
		now := time.Now()
		if c.plan.Shape != "events" {
			t.took(now.Sub(began))
		}
		began = now
	}
}

// scheduled asks at random moments, the same in each run (Poisson, from the connection's own seed). Where an answer is still
// awaited when the next request is due, that one counts from when it was due: a slow answer does not hide those behind it.
// Where the connection is free, it counts from when it was sent: a timer of ours that is late is not the server's delay.
func (c *h1) scheduled(start, until time.Time, t *tally) {
	random := rand.New(rand.NewSource(c.random.Int63()))
	each := float64(c.plan.Connections) / c.plan.Rate * float64(time.Second)
	for due := start; ; {
		due = due.Add(time.Duration(random.ExpFloat64() * each))
		if due.After(until) {
			return
		}
		began := due
		if wait := time.Until(due); wait > 0 {
			time.Sleep(wait)
			began = time.Now()
		}
		if !c.once(t) {
			return
		}
		t.took(time.Since(began))
	}
}

func (c *h1) deadline(until time.Time) func() {
	_ = c.conn.SetDeadline(until.Add(patience))
	return func() { _ = c.conn.SetDeadline(time.Time{}) }
}

// once makes one exchange, and says whether the connection can go on.
func (c *h1) once(t *tally) bool {
	err := c.exchange(t)
	if err == nil {
		t.answers++
		if c.plan.Shape != "events" {
			t.units++
		}
	} else {
		t.failed(reason(err))
	}
	var status statusError
	if err != nil && !errors.As(err, &status) || c.closed {
		_ = c.conn.Close()
		conn, err := c.dialer.dial()
		if err != nil {
			t.failed(reason(err))
			return false
		}
		t.reopened++
		_ = conn.SetDeadline(time.Now().Add(time.Duration(c.plan.Seconds*float64(time.Second)) + patience))
		c.conn, c.closed = conn, false
		c.in.Reset(conn)
	}
	return true
}

// statusError is an answer that is whole, and not what was wanted.
type statusError string

func (e statusError) Error() string { return string(e) }

func (c *h1) exchange(t *tally) error {
	c.out = append(append(c.out[:0], c.plan.Method...), ' ')
	c.out = append(c.plan.path(c.out), c.rest...)
	if _, err := c.conn.Write(c.out); err != nil {
		return err
	}
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return err
	}
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.1 ")) {
		return fmt.Errorf("no status line: %q", line)
	}
	status := string(line[9:12])
	length, chunked := -1, false
	for {
		if line, err = c.in.ReadSlice('\n'); err != nil {
			return err
		}
		name, value, _ := bytes.Cut(bytes.TrimRight(line, "\r\n"), []byte(":"))
		if len(name) == 0 {
			break
		}
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("content-length")):
			if length, err = strconv.Atoi(string(value)); err != nil {
				return err
			}
		case bytes.EqualFold(name, []byte("transfer-encoding")):
			chunked = bytes.EqualFold(value, []byte("chunked"))
		case bytes.EqualFold(name, []byte("connection")):
			c.closed = bytes.EqualFold(value, []byte("close"))
		}
	}
	if c.plan.Shape == "events" && status[0] == '2' {
		length, err = c.events(t)
	} else {
		length, err = c.body(length, chunked)
	}
	if err != nil {
		return err
	}
	if status[0] != '2' {
		return statusError(status)
	}
	if length != c.plan.Answer {
		return statusError(fmt.Sprintf("%d and not %d long", length, c.plan.Answer))
	}
	return nil
}

func (c *h1) body(length int, chunked bool) (int, error) {
	if chunked {
		read, err := io.Copy(io.Discard, httputil.NewChunkedReader(c.in))
		if err != nil {
			return 0, err
		}
		return int(read), c.trailers()
	}
	if length < 0 {
		return 0, errors.New("an answer without length")
	}
	return c.in.Discard(length)
}

// events reads a stream of server-sent events, each of which says when it was sent, and returns how many there were.
func (c *h1) events(t *tally) (int, error) {
	found := 0
	lines := bufio.NewReaderSize(httputil.NewChunkedReader(c.in), 4096)
	for {
		line, err := lines.ReadSlice('\n')
		if err == io.EOF {
			return found, c.trailers()
		}
		if err != nil {
			return found, err
		}
		if text, is := bytes.CutPrefix(line, []byte("data: ")); is {
			sent, err := strconv.ParseInt(string(bytes.TrimSpace(text[:20])), 10, 64)
			if err != nil {
				return found, err
			}
			found++
			t.units++
			t.took(time.Since(time.Unix(0, sent)))
		}
	}
}

// trailers reads what httputil leaves behind the last chunk.
func (c *h1) trailers() error {
	for {
		line, err := c.in.ReadSlice('\n')
		if err != nil || len(bytes.TrimSpace(line)) == 0 {
			return err
		}
	}
}

// fresh opens a connection for each request, or for no request at all.
type fresh struct {
	plan   *plan
	dialer *dialer
}

func (f *fresh) run(_, until time.Time, t *tally) {
	for began := time.Now(); began.Before(until); began = time.Now() {
		conn, err := f.dialer.dial()
		if err == nil {
			if f.plan.Shape == "handshake" {
				err = farewell(conn)
			} else {
				_ = conn.SetDeadline(time.Now().Add(patience))
				err = newH1(f.plan, f.dialer, conn, nil).exchange(t)
			}
			_ = conn.Close()
		}
		if err != nil {
			t.failed(reason(err))
			continue
		}
		t.answers++
		t.units++
		t.took(time.Since(began))
	}
}

// farewell says goodbye and waits for the end. In TLS 1.3 a client is done before the server has seen its certificate: one that
// refuses it says so now, by an alert, and only one that has accepted it reads the goodbye and ends in peace.
func farewell(conn net.Conn) error {
	secured, is := conn.(*tls.Conn)
	if !is {
		return errors.New("a handshake without TLS")
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	if err := secured.CloseWrite(); err != nil {
		return err
	}
	_, err := conn.Read(make([]byte, 1))
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	if err == nil {
		return errors.New("bytes instead of an end")
	}
	return err
}
